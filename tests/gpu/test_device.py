"""How the kernels behave on a device: graphs, streams, waits, several devices, launches."""

import dataclasses

import pytest
import torch
from on_gpu.clocks import launches, sync_debug
from ops.checks import EPS, routing_of, tensors

import pmod_ops
from pmod_ops.testing import LAYER, TABLE, Sample

pytestmark = pytest.mark.cuda

SAMPLES = (TABLE[3], Sample("llava15", ("t60 v576",), hidden=4096))
DENSE = 3  # launches of a dense layer with fused norms: norm, addition and norm, addition
BEYOND = 3  # launches that routing may add to them, without the scores of its first layer


def inputs(sample, device="cuda"):
    """What the glue of a layer reads, by name; the logits came from the layer before."""
    case = sample.make(torch.bfloat16, device)
    routing = routing_of(case)
    t = tensors(case, routing)
    read = {"x": t.x, "attn_out": t.attn_out, "update": t.update, "logits": routing.logits}
    return case, {name: tensor.clone() for name, tensor in read.items()}


def glue(case, t):
    """All a routed layer adds at inference, with tensors in place of attention and MLP."""
    router = (case.router_weight, case.router_bias)
    with torch.no_grad():
        routing, rows = pmod_ops.route_gather(
            t["x"], None, None, case.plan, LAYER, case.norm_weight, EPS, logits=t["logits"]
        )
        residual, normed = pmod_ops.gather_add_rmsnorm(
            t["x"], t["attn_out"], routing, case.norm_weight, EPS
        )
        out, logits = pmod_ops.weighted_scatter_add(
            t["x"], residual, t["update"], routing, next_router=router
        )
    return routing.index, routing.inverse, routing.gate, rows, residual, normed, out, logits


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_graph_of_the_glue_is_replayed_on_new_values(sample):
    case, t = inputs(sample)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        glue(case, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = glue(case, t)
    for shift in (1, 5):
        for tensor in t.values():
            tensor.copy_(tensor.roll(shift, 0))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(out, glue(case, t))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_nothing_waits_for_the_device(sample):
    case, t = inputs(sample)
    with sync_debug("error"):
        glue(case, t)


def test_a_layer_in_training_does_not_wait_for_the_device():
    case, t = inputs(SAMPLES[0])
    leaves = [t["x"].requires_grad_(), case.router_weight.requires_grad_()]
    with sync_debug("error"):
        routing, rows, x = pmod_ops.route_gather(
            *leaves, case.router_bias, case.plan, LAYER, case.norm_weight, EPS, return_x=True
        )
        residual, normed, x = pmod_ops.gather_add_rmsnorm(
            x, t["attn_out"] + rows, routing, case.norm_weight, EPS, return_x=True
        )
        out = pmod_ops.weighted_scatter_add(x, residual, t["update"] * normed, routing)
        torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_ops_run_on_the_current_stream(sample):
    """Their input is there only after a while, on a side stream."""
    case, t = inputs(sample)
    expected = glue(case, t)
    late = {name: torch.full_like(tensor, torch.nan) for name, tensor in t.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in late.items():
            tensor.copy_(t[name])
        out = glue(case, late)
    stream.synchronize()
    assert_equal(out, expected)


def test_tensors_on_cpu_and_gpu_are_refused():
    case, _ = inputs(TABLE[3])
    on_cpu = routing_of(TABLE[3].make(torch.bfloat16))
    with pytest.raises(ValueError, match="gather: routing: expected device cuda:0 like x"):
        pmod_ops.gather(case.x, on_cpu)
    with pytest.raises(RuntimeError, match="gather"):
        torch.ops.pmod.gather(case.x, on_cpu.index)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two devices")
def test_tensors_on_two_devices_are_refused():
    here, there = inputs(TABLE[3])[0], routing_of(TABLE[3].make(torch.bfloat16, "cuda:1"))
    with pytest.raises(ValueError, match="gather: routing: expected device cuda:0 like x"):
        pmod_ops.gather(here.x, there)
    with pytest.raises(RuntimeError, match=r"gather: index: expected device cuda:0"):
        torch.ops.pmod.gather(here.x, there.index)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two devices")
def test_the_device_of_the_tensors_is_used_and_the_current_one_stays():
    case, t = inputs(TABLE[3], "cuda:1")
    out = glue(case, t)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == case.x.device for tensor in out)
    assert_equal([tensor.cpu() for tensor in out], [o.cpu() for o in glue(*inputs(TABLE[3]))])


def test_an_index_beyond_the_rows_is_filler():
    case, _ = inputs(TABLE[3])
    routing = routing_of(case)
    index = torch.full_like(routing.index, case.plan.num_rows)
    rows = pmod_ops.gather(case.x, dataclasses.replace(routing, index=index))
    assert not rows.any()


@pytest.mark.usefixtures("unfilled")
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_launches_beyond_a_dense_layer(sample):
    case, t = inputs(sample)
    glue(case, t)
    count = launches({"glue": lambda: glue(case, t)})["glue"]
    if count is None:
        pytest.skip("the profiler sees no kernels: it may not be allowed to")
    assert DENSE < count <= DENSE + BEYOND
