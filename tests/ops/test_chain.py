"""The whole glue of a layer with x handed from op to op: one gradient buffer, the router folded in."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from ops.checks import EPS, checkable, eager_dtype, finite, router_scales, routing_of

import pmod_ops
from pmod_ops import reference
from pmod_ops._library import GradientBuffer
from pmod_ops.testing import DTYPES, LAYER, TABLE, assert_no_worse

LEAVES = ("x", "router_weight", "router_bias", "norm_weight", "attn_out", "update")


def leaves_of(case, dtype=None):
    present = {name: getattr(case, name) for name in LEAVES if getattr(case, name) is not None}
    return {
        name: t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for name, t in present.items()
    }


def glue(module, t, case, chained, routing=None):
    """A routed layer with leaf tensors in place of attention and MLP.

    The gathered rows enter the update, so that their gradient is used. With `routing`, its selection
    replaces the one of `module`.
    """
    router = (t["router_weight"], t.get("router_bias"))
    options = {"layout": case.sample.layout, **case.sample.gate}
    x = t["x"]
    if case.sample.is_batch:
        x = x.view(case.plan.num_sequences, -1, x.shape[-1])  # as a model has it
    own, rows, *rest = module.route_gather(
        x, *router, case.plan, LAYER, t["norm_weight"], EPS, return_x=chained, **options
    )
    if routing is not None:
        own = dataclasses.replace(routing, logits=own.logits, gate=own.gate)
        rows = module.gather_rmsnorm(x, own, t["norm_weight"], EPS)
    x = rest[0] if chained else x
    attn_out = t["attn_out"] + rows
    residual, normed, *rest = module.gather_add_rmsnorm(
        x, attn_out, own, t["norm_weight"], EPS, return_x=chained
    )
    x = rest[0] if chained else x
    update = t["update"] * normed
    out = module.weighted_scatter_add(x, residual, update, own, **case.sample.scatter)
    return out.view(t["x"].shape)


def gradients(out, leaves):
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    return torch.autograd.grad(
        out,
        list(leaves.values()),
        cotangent.to(out),
        allow_unused=True,
        materialize_grads=True,
    )


def bias_gradient(case, routing):
    leaves = leaves_of(case, torch.float64)
    grads = gradients(glue(reference, leaves, case, False, routing), leaves)
    return dict(zip(leaves, grads, strict=True))["router_bias"]


@pytest.mark.parametrize("chained", [False, True], ids=["plain", "chained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", finite(TABLE), ids=str)
def test_gradients_of_a_layer(sample, dtype, chained):
    check_layer(sample, dtype, chained)


def check_layer(sample, dtype, chained, device="cpu"):
    case = sample.make(dtype, device)
    routing = routing_of(case)
    ours = leaves_of(case)
    out = glue(pmod_ops, ours, case, chained)
    results = []
    for kind in (eager_dtype(dtype), torch.float64):
        leaves = leaves_of(case, kind)
        results.append((o := glue(reference, leaves, case, False, routing), gradients(o, leaves)))
    (eager, eager_grads), (exact, exact_grads) = results
    assert_no_worse(out, eager, exact)
    grads = gradients(out, ours)
    scales = router_scales(case, lambda c: bias_gradient(c, routing))
    for name, a, b, c in zip(ours, grads, eager_grads, exact_grads, strict=True):
        assert_no_worse(a, b, c, f"gradient of {name}", scales.get(name))


@pytest.mark.parametrize("sample", checkable(TABLE), ids=str)
def test_gradcheck(sample):
    case = sample.make(torch.float64)
    leaves = leaves_of(case)

    def function(*values):
        return glue(pmod_ops, dict(zip(leaves, values, strict=True)), case, True)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.compile
@pytest.mark.parametrize("sample", finite(TABLE)[:8], ids=str)
def test_compile_aot_eager(sample):
    check_compiled_glue(sample, "aot_eager")


@pytest.mark.compile
def test_compile_inductor():
    check_compiled_glue(TABLE[1], "inductor")


def check_compiled_glue(sample, backend):
    torch.compiler.reset()
    case = sample.make()

    def function(leaves):
        return glue(pmod_ops, leaves, case, True)

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend, dynamic=False)):
        leaves = leaves_of(case)
        results.append((out := f(leaves), *gradients(out, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_export_keeps_the_ops():
    case = TABLE[0].make()

    class Glue(torch.nn.Module):
        def forward(self, x, plan, weight, norm, update):
            routing, rows = pmod_ops.route_gather(x, weight, None, plan, LAYER, norm)
            return pmod_ops.weighted_scatter_add(x, rows, update, routing)

    arguments = (case.x, case.plan, case.router_weight, case.norm_weight, case.update)
    exported = torch.export.export(Glue(), arguments)
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"pmod.route_gather.default", "pmod.weighted_scatter_add.default"} <= names
    assert torch.equal(exported.module()(*arguments), Glue()(*arguments))


def readers(module, leaves, routing, chained):
    """Every op that can hand x on, one after another."""
    x, weight = leaves["x"], leaves["router_weight"]
    outputs = []
    options = {"return_x": True} if chained else {}

    def read(result, count):
        nonlocal x
        result = result if isinstance(result, tuple) else (result,)
        outputs.extend(result[:count])
        x = result[-1] if chained else x

    rows = leaves["update"]
    own = module.route(x, weight, None, PLAN, LAYER, **options)
    own, x = own if chained else (own, x)
    outputs.append(own.gate)
    read(module.gather(x, routing, **options), 1)
    read(module.gather_rmsnorm(x, routing, leaves["norm_weight"], EPS, **options), 1)
    read(module.gather_add_rmsnorm(x, rows, routing, leaves["norm_weight"], EPS, **options), 2)
    read(module.weighted_scatter_add(x, rows, rows, own, **options), 1)
    read(module.gather(x, routing, **options), 1)
    return torch.cat([out.reshape(-1) for out in outputs])


PLAN = TABLE[0].plan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_reader_hands_x_on(dtype):
    case = TABLE[0].make(dtype)
    routing = routing_of(case)
    results = []
    for module, chained, kind in (
        (pmod_ops, True, None),
        (reference, False, eager_dtype(dtype)),
        (reference, False, torch.float64),
    ):
        leaves = leaves_of(case, kind)
        leaves.pop("attn_out")
        leaves.pop("router_bias")
        results.append(gradients(readers(module, leaves, routing, chained), leaves))
    for a, b, c in zip(*results, strict=True):
        assert_no_worse(a, b, c)


def test_one_buffer_goes_down_the_chain(monkeypatch):
    case = TABLE[0].make()
    routing = routing_of(case)
    buffers = []
    release = GradientBuffer.release

    def watched(self):
        buffers.append(self.tensor.data_ptr())
        return release(self)

    monkeypatch.setattr(GradientBuffer, "release", watched)
    # x is not a leaf, as in a model
    x = case.x.requires_grad_() * 1
    rows, x = pmod_ops.gather_rmsnorm(x, routing, case.norm_weight, EPS, return_x=True)
    kept, x = pmod_ops.gather(x, routing, return_x=True)
    (rows.sum() + kept.sum() + x.sum()).backward()
    assert len(buffers) == 2
    assert len(set(buffers)) == 1


def calls_of(monkeypatch, op, case):
    """The arguments with which the backward op `op` is called for a whole layer."""
    calls = []
    raw = getattr(torch.ops.pmod, op)

    def watched(*arguments):
        calls.append(arguments)
        return raw(*arguments)

    monkeypatch.setattr(torch.ops.pmod, op, watched)
    out = glue(pmod_ops, leaves_of(case), case, True)
    out.sum().backward()
    return calls


def test_no_row_of_a_gradient_is_written_twice(monkeypatch):
    """The layer's three backward ops neither copy, zero nor add to rows that another one owns."""
    case = TABLE[0].make()
    with monkeypatch.context() as patch:
        (arguments,) = calls_of(patch, "weighted_scatter_add_backward", case)
    assert arguments[-2:] == (False, False)  # neither the residual's gradient nor zeros
    with monkeypatch.context() as patch:
        (arguments,) = calls_of(patch, "gather_add_rmsnorm_backward_", case)
    grad_x, grad_residual, grad_out, *_ = arguments
    assert grad_x is None
    assert grad_residual is None
    assert grad_out.shape == case.x.shape
    with monkeypatch.context() as patch:
        (arguments,) = calls_of(patch, "route_gather_backward_", case)
    assert arguments[-1] is True  # kept rows are overwritten
    assert arguments[4] is not None


@pytest.mark.parametrize(
    "change",
    ["nothing", "another_reader", "scaled", "hook", "retains_grad", "other_slots"],
)
def test_a_residual_that_is_more_than_passed_on_gets_its_whole_gradient(change):
    case = TABLE[4].make(torch.float64)

    def gradients_of_layer(chained):
        leaves = leaves_of(case)
        x, seen = leaves["x"] * 1, []
        routing, rows, *rest = pmod_ops.route_gather(
            x, leaves["router_weight"], None, case.plan, LAYER, return_x=chained
        )
        x = rest[0] if chained else x
        residual, normed = pmod_ops.gather_add_rmsnorm(
            x, leaves["attn_out"] + rows, routing, leaves["norm_weight"], EPS
        )
        other = 0
        if change == "another_reader":
            other = residual.sin().sum()
        if change == "scaled":
            residual = residual * 3
        if change == "hook":
            residual.register_hook(lambda grad: seen.append(grad) or grad * 2)
        if change == "retains_grad":
            residual.retain_grad()
        if change == "other_slots":
            routing = dataclasses.replace(routing, index=routing.index.clone())
        out = pmod_ops.weighted_scatter_add(x, residual, leaves["update"] * normed, routing)
        loss = (out * case.x).sum() + other
        grads = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return (*grads, *seen)

    for a, b in zip(gradients_of_layer(True), gradients_of_layer(False), strict=True):
        torch.testing.assert_close(a, b)


def layer_gradients(case, chained, between):
    """Gradients of a layer of leaves; `between(routing, x)` may change both after route_gather."""
    leaves = leaves_of(case)
    x = leaves["x"] * 1
    routing, _, *rest = pmod_ops.route_gather(
        x, leaves["router_weight"], None, case.plan, LAYER, return_x=chained
    )
    routing, x = between(routing, rest[0] if chained else x)
    slots = routing.index.shape[0]
    attn, update = leaves["attn_out"][:slots], leaves["update"][:slots]
    if routing.layout == "padded":
        attn, update = (
            routing.rows(t.new_zeros(slots, t.shape[-1])) + t.mean() for t in (attn, update)
        )
    residual, rows = pmod_ops.gather_add_rmsnorm(x, attn, routing, leaves["norm_weight"], EPS)
    out = pmod_ops.weighted_scatter_add(x, residual, update * rows, routing)
    return gradients(out, leaves)


def another_selection(routing, x):
    index = routing.index.flip(0).roll(1).sort().values  # a tensor of its own, other rows:
    index[-1] = (routing.inverse < 0).nonzero()[-1, 0]
    index = index.unique().to(torch.int32)
    inverse = torch.full_like(routing.inverse, -1)
    inverse[index.long()] = torch.arange(len(index), dtype=torch.int32)
    return dataclasses.replace(routing, index=index, inverse=inverse), x


def fewer_rows(routing, x):
    inverse = routing.inverse.clone()
    inverse[routing.index[-1]] = -1
    return dataclasses.replace(routing, inverse=inverse), x


def other_logits(routing, x):
    return dataclasses.replace(routing, logits=routing.logits / 3), x


def hook(routing, x):
    x.register_hook(lambda grad: grad.clone())  # fails if it is given None
    return routing, x


@pytest.mark.parametrize(
    "between",
    [
        another_selection,
        fewer_rows,
        other_logits,
        hook,
        lambda routing, x: (routing.padded(), x),
    ],
    ids=["another_selection", "fewer_rows", "other_logits", "hook", "padded"],
)
@pytest.mark.parametrize("sample", [TABLE[0], TABLE[4]], ids=str)
def test_a_changed_routing_gets_its_gradients_the_ordinary_way(sample, between):
    case = sample.make(torch.float64)
    chained, plain = (layer_gradients(case, chained, between) for chained in (True, False))
    for a, b in zip(chained, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_a_retained_gradient_of_the_returned_x_is_whole():
    case = TABLE[0].make(torch.float64)
    kept = []

    def retain(routing, x):
        x.retain_grad()
        kept.append(x)
        return routing, x

    layer_gradients(case, True, retain)
    leaves = leaves_of(case)
    routing, _, x = pmod_ops.route_gather(
        leaves["x"] * 1, leaves["router_weight"], None, case.plan, LAYER, return_x=True
    )
    x.retain_grad()
    out = pmod_ops.weighted_scatter_add(x, leaves["attn_out"], leaves["update"], routing)
    (out.sum() + x.sum()).backward()
    skipped = (routing.inverse < 0)[:, None]
    # skipped rows: gate * 1 + 1, and the router's part, which is folded in
    assert torch.equal(x.grad[~skipped.squeeze()], torch.ones_like(x.grad[~skipped.squeeze()]))
    assert (x.grad[skipped.squeeze()] != 1).any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection_finds_nothing_in_a_sound_layer():
    case = TABLE[0].make()
    poison = [torch.full_like(case.x, float("nan")) for _ in range(50)]
    with torch.autograd.detect_anomaly(check_nan=True):
        leaves = leaves_of(case)
        out = glue(pmod_ops, {**leaves, "x": leaves["x"] * 1}, case, True)
        del poison  # what is allocated next holds NaN
        gradients(out, leaves)


class Canary:
    """Can be referenced weakly, unlike a node of the graph."""


def test_a_gradient_keeps_no_graph_alive():
    case = TABLE[0].make()
    leaves = leaves_of(case)
    x = leaves["x"].tanh()
    x.grad_fn.metadata["canary"] = canary = Canary()
    gone = weakref.ref(canary)
    out = glue(pmod_ops, {**leaves, "x": x}, case, True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    del out, x, leaves, canary
    gc.collect()
    assert gone() is None
    assert torch.equal(copy.deepcopy(grad), grad)


def test_two_scatters_of_one_routing_add_up():
    case = TABLE[0].make(torch.float64)
    results = []
    for chained in (True, False):
        leaves = leaves_of(case)
        x = leaves["x"] * 1
        routing, rows, *rest = pmod_ops.route_gather(
            x, leaves["router_weight"], None, case.plan, LAYER, return_x=chained
        )
        x = rest[0] if chained else x
        first = pmod_ops.weighted_scatter_add(x, rows, leaves["update"], routing)
        second = pmod_ops.weighted_scatter_add(x, leaves["update"], rows, routing)
        third = pmod_ops.gather_add_rmsnorm(x, rows, routing, leaves["norm_weight"], EPS)[0]
        results.append(gradients(torch.cat((first * second, third, x)), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_that_another_branch_holds_is_not_overwritten():
    case = TABLE[0].make(torch.float64)
    routing = routing_of(case)
    weight = torch.randn(64, dtype=torch.float64)

    def loss(chained):
        u = case.x.clone().requires_grad_()
        h = u * 2
        _, rows, *rest = pmod_ops.route_gather(
            u * 1, weight, None, case.plan, LAYER, return_x=chained
        )
        y = (rest[0] if chained else u * 1) + h
        kept, *rest = (
            pmod_ops.gather(y, routing, return_x=True)
            if chained
            else (pmod_ops.gather(y, routing), y)
        )
        return u, kept.sum() + rows.sum() + (rest[0] * y.detach()).sum()

    grads = []
    for chained in (True, False):
        u, value = loss(chained)
        grads.append(torch.autograd.grad(value, u)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_gradients_twice_and_of_rows_alone():
    """Whatever part of a layer's outputs is used, and however often."""
    case = TABLE[0].make(torch.float64)
    results = []
    for chained in (True, False):
        leaves = leaves_of(case)
        x = leaves["x"] * 1
        routing, rows, *rest = pmod_ops.route_gather(
            x, leaves["router_weight"], None, case.plan, LAYER, leaves["norm_weight"], EPS,
            return_x=chained,
        )  # fmt: skip
        x = rest[0] if chained else x
        out = pmod_ops.weighted_scatter_add(x, rows, leaves["update"], routing)
        inputs = [leaves["x"], leaves["router_weight"], leaves["norm_weight"]]
        grads = []
        for loss in (out.sum(), rows.sum(), routing.gate.sum(), routing.logits.sum(), out.sum()):
            grads += torch.autograd.grad(
                loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        results.append(grads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_changed_x_is_not_folded():
    case = TABLE[0].make(torch.float64)
    results = []
    for chained in (True, False):
        leaves = leaves_of(case)
        x = leaves["x"] * 1
        routing, rows, *rest = pmod_ops.route_gather(
            x, leaves["router_weight"], None, case.plan, LAYER, return_x=chained
        )
        x = rest[0] * 3 if chained else x * 3
        out = pmod_ops.weighted_scatter_add(x, rows, leaves["update"], routing)
        results.append(gradients(out, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_users_gradient_is_not_overwritten():
    case = TABLE[0].make()
    routing = routing_of(case)
    x = case.x.requires_grad_()
    rows, passed = pmod_ops.gather(x, routing, return_x=True)
    cotangent = torch.ones_like(x)
    before = cotangent.clone()
    torch.autograd.grad((rows, passed), x, (torch.ones_like(rows), cotangent))
    assert torch.equal(cotangent, before)


def test_a_changed_gate_is_not_folded():
    case = TABLE[0].make(torch.float64)
    leaves = leaves_of(case)

    def out(chained):
        routing, rows, *rest = pmod_ops.route_gather(
            leaves["x"], leaves["router_weight"], None, case.plan, LAYER, return_x=chained
        )
        routing = dataclasses.replace(routing, gate=routing.gate.square())
        x = rest[0] if chained else leaves["x"]
        return pmod_ops.weighted_scatter_add(x, rows, leaves["update"], routing)

    for a, b in zip(gradients(out(True), leaves), gradients(out(False), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_is_refused():
    case = TABLE[0].make()
    leaves = leaves_of(case)
    out = glue(pmod_ops, leaves, case, True)
    with pytest.raises(RuntimeError, match="only first-order gradients are implemented"):
        torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
