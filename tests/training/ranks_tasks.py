"""What the ranks of a test do: train as one of the engines, beside a model that one rank trains."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from training import tiny_llava as tiny
from training.ranks import Progress
from training.ranks_engines import Engine, configured_deepspeed, leave, sgd
from training.trainer_runs import gradients_of_a_step

from pmod_model import PModLlavaForConditionalGeneration, load_pretrained

STEPS = 20
SHORT = 4
TIMEOUT_OF_ENDLESS = 5


def run(task: str, folder: Path, progress: Progress) -> None:
    if task.startswith("accumulate"):
        accumulate(task.removeprefix("accumulate-"), folder, progress)
    elif task == "endless":
        train_until_ended(progress)
    elif task.endswith("bf16"):
        train_in_bfloat16(task, progress)
    else:
        train_as(task, folder, progress)


def accumulate(engine: str, folder: Path, progress: Progress) -> None:
    """A step of the Trainer over eight samples, on two ranks, with ZeRO as the package has it."""
    # before DeepSpeed: under ZeRO-3 every model that is built later is spread over the ranks
    model = tiny.freeze_vision(tiny.make_model())
    accumulate_on(model, folder, progress, configured_deepspeed(engine))
    leave()


def accumulate_on(model: Any, folder: Path, progress: Progress, options: dict[str, Any]) -> None:
    progress.note("accumulate")
    found = gradients_of_a_step(model, folder, batch=2, accumulation=2, **options)
    if distributed.get_rank() == 0:
        save_file(found, folder / "gradients.safetensors")


def train_until_ended(progress: Progress) -> None:
    """Steps without end, for a test that ends or stops a rank."""
    engine = Engine("ddp", timeout=timedelta(seconds=TIMEOUT_OF_ENDLESS))
    model, optimizer = engine.prepare(tiny.freeze_vision(tiny.make_model()))
    batch = tiny.image_batch([0, 1])
    for step in itertools.count(1):
        engine.backward(model, model(**batch).loss)
        engine.step(model, optimizer)
        progress.note("endless", step)


def train_in_bfloat16(task: str, progress: Progress) -> None:
    """ZeRO over bfloat16 weights, as the recipe has it: losses fall on both ranks."""
    model = tiny.checkpoint_layers(tiny.freeze_vision(tiny.make_model()), use_reentrant=False)
    engine = Engine(task)
    spread, optimizer = engine.prepare(model)
    parts = [tiny.image_batch([0, 1]), tiny.with_blank_image(tiny.text_batch([2, 3]))]
    part = parts[engine.rank]
    part["pixel_values"] = part["pixel_values"].bfloat16()
    losses = []
    for step in range(STEPS):
        progress.note("bfloat16", step)
        losses.append(spread(**part).loss)
        engine.backward(spread, losses[-1])
        engine.step(spread, optimizer)
    assert losses[-1] < losses[0] / 2, losses
    assert all(p.dtype == torch.bfloat16 for p in engine.parameters(spread).values())
    leave()
    print(f"rank {engine.rank} agrees", flush=True)


def train_as(task: str, folder: Path, progress: Progress) -> None:
    # before the engine: under ZeRO-3 every model that is built later is spread over the ranks
    model = tiny.freeze_vision(tiny.make_model())
    engine = Engine(task)
    try:
        same_data(engine, model, progress)
        images_on_one_rank(engine, model, progress, STEPS, use_reentrant=False)
        images_on_one_rank(engine, model, progress, SHORT, use_reentrant=True)
        if engine.stage < 3:
            text_without_blank_images(engine, model, progress)
        save_and_load(engine, model, folder, progress)
        if engine.stage == 3:
            load_spread(engine, folder, progress)
        if task == "ddp":
            plain = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
            accumulate_on(copy.deepcopy(model), folder, progress, plain)
        print(f"rank {engine.rank} agrees", flush=True)
    finally:
        leave()


def same_data(engine: Engine, model: Any, progress: Progress) -> None:
    """Both ranks see one batch: what one rank alone computes with it."""
    batch = tiny.image_batch([0, 1])
    train_beside(engine, model, [[batch, batch]], progress, "same data")


def images_on_one_rank(
    engine: Engine, model: Any, progress: Progress, steps: int, *, use_reentrant: bool
) -> None:
    """Only one rank has images, by turns; the projector is trained; layers are checkpointed."""
    batches = [
        [
            tiny.image_batch([step % 12, 1]),
            tiny.with_blank_image(tiny.text_batch([step % 12, 2])),
        ][:: 1 - 2 * (step % 2)]
        for step in range(steps)
    ]
    model = tiny.checkpoint_layers(copy.deepcopy(model), use_reentrant=use_reentrant)
    train_beside(engine, model, batches, progress, "images on one rank")


def text_without_blank_images(engine: Engine, model: Any, progress: Progress) -> None:
    """Where tower and projector are frozen, and not spread module by module, routers suffice."""
    batches = [
        [tiny.image_batch([step, 1]), tiny.text_batch([step, 2])][:: 1 - 2 * (step % 2)]
        for step in range(SHORT)
    ]
    model = copy.deepcopy(model)
    model.model.multi_modal_projector.requires_grad_(False)
    train_beside(engine, model, batches, progress, "text without blank images")


def train_beside(
    engine: Engine,
    model: Any,
    batches: Sequence[Sequence[dict[str, Tensor]]],
    progress: Progress,
    doing: str,
) -> None:
    """Train with a batch for each rank, and alone with both: losses, gradients and weights agree.

    Bit by bit, since half the sum of two numbers is the same in any order. Only hooks of ZeRO-3
    make autograd add the parts of a residual's gradient in another order: 2^-24 a sum, amplified
    by the layers, and carried on by every step.
    """
    alone = copy.deepcopy(model)
    alone_optimizer = sgd(alone)
    spread, optimizer = engine.prepare(copy.deepcopy(model))
    error = 0.0
    for step, parts in enumerate(batches):
        progress.note(doing, step)
        error = (step + 1) * 1e-5 if engine.stage == 3 else 0.0
        losses = [alone(**part).loss for part in parts]
        for loss in losses:
            (loss / 2).backward()
        loss = spread(**parts[engine.rank]).loss
        engine.backward(spread, loss)
        check({"loss": loss}, {"loss": losses[engine.rank]}, error)
        got = engine.gradients(spread)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert got.keys() == trained, trained ^ got.keys()
        assert sum("mod_router" in name for name in got) == 2 * tiny.ROUTED
        check(got, tiny.gradients(alone), error)
        engine.step(spread, optimizer)
        alone_optimizer.step()
        alone_optimizer.zero_grad()
    check(engine.parameters(spread), dict(alone.named_parameters()), error)


def check(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], error: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        off = (got[name] - value).abs().max()
        assert off <= error * value.abs().max(), f"{name}: off by {off:.3g} of {value.abs().max()}"


def save_and_load(engine: Engine, model: Any, folder: Path, progress: Progress) -> None:
    """Whole weights for `from_pretrained`, and the state of accelerate, which a step changes."""
    progress.note("save")
    spread, optimizer = engine.prepare(copy.deepcopy(model))
    parts = [tiny.image_batch([0, 1]), tiny.with_blank_image(tiny.text_batch([2, 3]))]
    take_step(engine, spread, optimizer, parts)
    before = logits(spread, parts[engine.rank])
    whole = engine.accelerator.get_state_dict(spread)
    if engine.rank == 0:
        assert whole is not None
        assert sum("mod_router" in key for key in whole) == 2 * tiny.ROUTED
        engine.unwrapped(spread).save_pretrained(folder / "whole", state_dict=whole)
        save_file({"logits": before}, folder / "logits.safetensors")
    progress.note("save the state")
    engine.accelerator.save_state(str(folder / "state"))
    take_step(engine, spread, optimizer, parts)
    assert not torch.equal(logits(spread, parts[engine.rank]), before)
    progress.note("load the state")
    engine.accelerator.load_state(str(folder / "state"))
    assert torch.equal(logits(spread, parts[engine.rank]), before)


def load_spread(engine: Engine, folder: Path, progress: Progress) -> None:
    """`from_pretrained` spreads weights while it reads them, those of a plain LLaVA as well."""
    progress.note("from_pretrained")
    loaded, _ = engine.prepare(tiny.freeze_vision(load_pretrained(folder / "whole")))
    part = [tiny.image_batch([0, 1]), tiny.with_blank_image(tiny.text_batch([2, 3]))][engine.rank]
    engine.backward(loaded, loaded(**part).loss)
    got = logits(loaded, part)
    if engine.rank == 0:
        save_file({"logits": got}, folder / "spread.safetensors")
    progress.note("from_pretrained of a plain LLaVA")
    plain: Any = PModLlavaForConditionalGeneration.from_pretrained(
        folder / "plain", config=tiny.pmod_config(folder / "plain")
    )
    spread, _ = engine.prepare(tiny.freeze_vision(plain))
    routers = {n: p for n, p in engine.parameters(spread).items() if "mod_router" in n}
    assert {tuple(p.shape) for p in routers.values()} == {(1, tiny.SIZES.hidden_size), (1,)}
    assert len(routers) == 2 * tiny.ROUTED
    assert not any(p.any() for p in routers.values())
    engine.backward(spread, spread(**part).loss)


def take_step(engine: Engine, model: Any, optimizer: Any, parts: Sequence[Any]) -> None:
    model.train()
    engine.backward(model, model(**parts[engine.rank]).loss)
    engine.step(model, optimizer)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    model.eval()  # returns nothing where DeepSpeed wraps the model
    return model(**batch).logits


def norms(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm")


def unfused(*_: Any) -> None:
    """A hook that does nothing: ZeRO-3 puts hooks on every module, so norms are called there."""
