"""Batches: packed as good as padded, and an image that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.tiny_models import KINDS, as_dtype, dummy, feature, make_model, ragged, text_only

from pmod_model import record_routing
from pmod_model.data.collators import Collator, PackedCollator
from pmod_model.data.errors import InputError

PMOD = KINDS[:2]


def run(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
    """Loss, gradients, and the kept tokens of routed layers."""
    model.zero_grad(set_to_none=True)
    if getattr(model, "pmod_config", None) is None and not hasattr(model.config, "pmod"):
        loss, kept = model(**batch).loss, {}
    else:
        with record_routing(model) as records:
            loss = model(**batch).loss
        kept = records[0].kept if records else {}
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, kept


def first_ignored(features: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Nothing predicts the first token of a row, so that its label counts in neither batch."""
    for row in features:
        row["labels"] = torch.cat((torch.tensor([-100]), row["labels"][1:]))
    return features


def test_packed_batch_has_no_filler() -> None:
    batch = PackedCollator()(ragged("pmod-llava"))
    lengths = [22, 36, 6]
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 64)
    assert batch["position_ids"].tolist() == [[i for n in lengths for i in range(n)]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == torch.int32
        assert batch[name].tolist() == [0, 22, 58, 64]
    assert batch["max_length_q"] == batch["max_length_k"] == 36
    assert batch["labels"][0, [0, 22, 58]].tolist() == [-100] * 3
    assert batch["labels"][0, 59:].tolist() == [21, 22, 23, 24, 25]
    assert batch["pixel_values"].shape[0] == 3
    assert "attention_mask" not in batch


def test_packing_changes_no_feature() -> None:
    features = ragged("pmod-llava")
    before = [row["labels"].clone() for row in features]
    PackedCollator()(features)
    assert all(torch.equal(row["labels"], old) for row, old in zip(features, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_padded(kind: str, dtype: torch.dtype, checkpointing: bool) -> None:
    # A float64 model still computes norms and loss in float32, of 6e-8 a value; some hundred
    # roundings on the way from a token to a parameter add up to 1e-5 of the largest gradient, and
    # to ten times that where every product is rounded so too.
    bound = 1e-5 if dtype == torch.float64 else 1e-4
    model = make_model(kind).to(dtype)
    if checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    features = first_ignored(ragged(kind))
    padded = as_dtype(Collator(0)(features), dtype)
    packed = as_dtype(PackedCollator(offsets=kind in PMOD)(features), dtype)
    loss, grads, kept = run(model, padded)
    got, got_grads, got_kept = run(model, packed)
    assert abs(float(got - loss)) <= bound * float(loss)
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((got_grads[name] - grad).abs().max()) <= bound * scale, name
    valid = padded["attention_mask"].bool()
    assert kept.keys() == got_kept.keys()
    assert bool(kept) == (kind in PMOD)
    for layer, mask in kept.items():
        assert torch.equal(got_kept[layer][0], mask[valid])


def test_positions_alone_tell_a_pmod_model() -> None:
    model = make_model("pmod-llava")
    features = ragged("pmod-llava")
    loss, grads, _ = run(model, PackedCollator()(features))
    again, same, _ = run(model, PackedCollator(offsets=False)(features))
    assert torch.equal(loss, again)
    assert all(torch.equal(same[name], grads[name]) for name in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packs", [False, True])
def test_dummy_image_changes_nothing_but_is_there(kind: str, packs: bool) -> None:
    model = make_model(kind).double()
    image = dummy(kind)
    features = first_ignored(text_only(kind))
    if packs:
        plain, with_image = (PackedCollator(kind in PMOD, d)(features) for d in (None, image))
    else:
        plain, with_image = (Collator(0, d)(features) for d in (None, image))
    loss, grads, _ = run(model, plain)
    got, got_grads, _ = run(model, as_dtype(with_image, torch.float64))
    # masked tokens get weight 0 exactly, but sums over a longer row are split otherwise
    assert abs(float(got - loss)) <= 1e-6 * float(loss)
    for name, grad in grads.items():
        if ".mod_router." in name:
            continue
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((got_grads[name] - grad).abs().max()) <= 1e-6 * scale, name
    projector = [name for name in got_grads if "multi_modal_projector" in name]
    assert len(projector) == 4
    unseen = [*projector, *(name for name in got_grads if ".mod_router." in name)]
    assert len(unseen) == 4 + 6 * (kind in PMOD)
    assert any("vision_tower" in name for name in got_grads)
    unseen += [name for name in got_grads if "vision_tower" in name or "newline" in name]
    assert not any(bool(got_grads[name].any()) for name in unseen)


def test_dummy_image_is_masked_after_the_shortest_row() -> None:
    batch = Collator(0, dummy("pmod-llava"))(text_only("pmod-llava"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9] + [0] * 14, [11, 12, 13] + [120] * 16]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3]
    assert (batch["labels"] != -100).sum() == 8
    assert batch["pixel_values"].shape[0] == 1


def test_dummy_image_stays_out_of_a_batch_with_images() -> None:
    features = ragged("pmod-llava")
    image = dummy("pmod-llava")
    for plain, other in (
        (Collator(0), Collator(0, image)),
        (PackedCollator(), PackedCollator(dummy=image)),
    ):
        first, second = plain(features), other(features)
        assert first.keys() == second.keys()
        assert torch.equal(first["input_ids"], second["input_ids"])
        assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_batch_without_labels_is_refused() -> None:
    row = feature("pmod-llava", [5, 6, 7], [])
    row["labels"] = torch.tensor([5, -100, -100])  # nothing predicts the first
    for collate in (Collator(0), PackedCollator()):
        with pytest.raises(InputError, match="batch: expected at least one label"):
            collate([row])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pmod-llava", "dense-llava"])
@pytest.mark.parametrize("packs", [False, True])
def test_rank_without_images_keeps_up(kind: str, packs: bool) -> None:
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    worker = [str(Path(__file__).with_name("data_parallel_worker.py")), kind, str(packs)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launch, *worker],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "rank 0 agrees" in run.stdout
    assert "rank 1 agrees" in run.stdout


@pytest.mark.parametrize("packs", [False, True])
def test_trainer_takes_the_batches(packs: bool, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    kind = "pmod-llava"
    image = dummy(kind)
    samples: Any = [*ragged(kind), *text_only(kind), feature(kind, [30, 31, 32], [])]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    collate = PackedCollator(dummy=image) if packs else Collator(0, image)
    model = make_model(kind)
    trainer = Trainer(model, arguments, train_dataset=samples, data_collator=collate)
    result = trainer.train()
    assert result.global_step == 3
    assert 0 < result.training_loss < 20
