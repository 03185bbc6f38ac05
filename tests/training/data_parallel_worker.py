"""One of two ranks, the second of which has no image: `torchrun data_parallel_worker.py KIND PACKS`.

DistributedDataParallel waits for the gradient of every parameter that it was told of.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from training.tiny_models import KINDS, dummy, make_model, ragged, text_only

from pmod_model.data.collators import Collator, PackedCollator


def main(kind: str, packs: str) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        rank = distributed.get_rank()
        image = dummy(kind)
        collate = (
            PackedCollator(kind in KINDS[:2], image) if packs == "True" else Collator(0, image)
        )
        batches = [collate(ragged(kind)[:2]), collate(text_only(kind))]
        model, alone = make_model(kind), make_model(kind)
        for name, parameter in (*model.named_parameters(), *alone.named_parameters()):
            # the tower's last layer and norm come after the features that are taken
            if "post_layernorm" in name or "encoder.layers.1." in name:
                parameter.requires_grad_(False)
        shared = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            shared(**batches[rank]).loss.backward()
        for batch in batches:
            (alone(**batch).loss / 2).backward()
        for (name, got), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert (got.grad is None) == (expected.grad is None), name
            if got.grad is not None and expected.grad is not None:
                # the mean of two float32 gradients, rounded once more: 2^-23
                scale = float(expected.grad.abs().max())
                assert float((got.grad - expected.grad).abs().max()) <= 3e-7 * scale, name
        seen = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        assert any("multi_modal_projector" in name for name in seen)
        print("rank", rank, "agrees")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
