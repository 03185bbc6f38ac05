// Launches of route.cuh.

#include "cuda/dispatch.h"
#include "cuda/route.cuh"

namespace pmod::cuda {
namespace {

unsigned blocks_for(int64_t rows, int each) {
  return static_cast<unsigned>((rows + each - 1) / each);
}

}  // namespace

Status launch_score(const Rows& rows, const Score& score) {
  if (score.rows == 0) return kSuccess;
  const unsigned grid = blocks_for(score.rows, kScoreRows);
  return dispatch_rows(rows, {score.x, score.weight.data}, [&]<typename T, bool kAligned>() {
    return dispatch_weight<T>(score.weight, [&]<typename W>() {
      using S = Streamed<T, kAligned>;
      return launch(score_kernel<S, W>, grid, kScoreThreads, rows.stream, false, score, rows.hidden,
                    block_size<S>(rows.hidden));
    });
  });
}

Status launch_logit_gradient(const Gate& gate, const LogitGradient& gradient, Stream stream) {
  if (gradient.rows == 0) return kSuccess;
  if (gate.activation == Activation::kSoftmax && gradient.grad_gate != nullptr) {
    return launch(softmax_logit_gradient_kernel, static_cast<unsigned>(gradient.sequences),
                  kSoftmaxThreads, stream, false, gate, gradient);
  }
  return launch(logit_gradient_kernel, blocks_for(gradient.rows, kGradientThreads),
                kGradientThreads, stream, false, gate, gradient);
}

}  // namespace pmod::cuda
