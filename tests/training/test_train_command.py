"""`pmod train CONFIG.yaml`: fields, presets, what is trained, what is logged, and going on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.utils import logging

from pmod_model.cli import main
from pmod_model.configuration import PModConfig
from pmod_model.data.dataset import ConversationDataset
from pmod_model.data.easyvqa import easy_vqa_records
from pmod_model.data.errors import InputError
from pmod_model.training.config import TrainConfig, load_config, presets, render_config
from pmod_model.training.train import checkpoint_folder, train

TINY: dict[str, Any] = {"steps": 4, "batch_size": 2, "turns": 2, "log_every": 1}
TINY |= {"hidden_size": 32, "layers": 4, "image_size": 32}


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    yield
    logging.enable_progress_bar()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("plain") / "run"
    return train(load_config("demo", {**TINY, "output": output})), output


def test_every_field_is_documented_and_read_back(tmp_path: Path) -> None:
    assert all(field.description for field in TrainConfig.model_fields.values())
    config = load_config(None, {"augment": ["flip"], "pmod": {"mean_ratio": 0.4}, "epochs": 2})
    path = tmp_path / "run.yaml"
    path.write_text(render_config(config))
    assert load_config(str(path)) == config
    assert (config.steps, config.epochs) == (None, 2)
    assert load_config(str(path), {"steps": 7}).epochs is None
    merged = load_config(str(path), {"pmod": {"min_ratio": 0.2}}).pmod
    assert merged == PModConfig(mean_ratio=0.4, min_ratio=0.2)
    assert load_config(str(path), {"pmod": None}).pmod is None


def test_the_papers_recipe() -> None:
    for name, length, accumulation, zero in (
        ("llava-1.5-7b", 2048, 1, "zero1"),
        ("llava-next-7b", 4096, 4, "zero3"),
    ):
        config = load_config(name)
        assert 8 * config.batch_size * config.gradient_accumulation == 128
        assert config.gradient_accumulation == accumulation
        assert (config.max_length, config.deepspeed) == (length, zero)
        assert (config.learning_rate, config.weight_decay, config.warmup) == (2e-5, 0, 0.03)
        assert (config.schedule, config.precision, config.trained) == (
            "cosine",
            "bfloat16",
            "language",
        )
        assert config.gradient_checkpointing
        assert config.group_by_modality
        assert config.pmod == PModConfig()


def test_a_config_can_be_printed_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--set", "turns=0", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["turns"], printed["steps"]) == (0, 400)
    assert printed.keys() == TrainConfig.model_fields.keys()
    assert main(["train", "--list-configs"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in presets())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "expected YAML"),
        ("- 1", "expected field: value lines, got list"),
        ("stepz: 3", 'stepz: expected a known field, got an unknown one; did you mean "steps"'),
        ("steps: 3\nepochs: 1", "--steps: expected either steps or epochs, got 3 and 1.0"),
        ("trained: lora\ndeepspeed: zero2", "--trained: expected no lora with deepspeed"),
        ("hidden_size: 40", "--hidden-size: expected a multiple of 32, got 40"),
        ("pmod: 3", "pmod"),
        ("augment: [turn]", "'flip' or 'shift', got 'turn'"),
        ("keep: 1", "--keep: expected a number greater than or equal to 2, got 1"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(path))
    assert message in str(error.value)


def test_the_log_tells_what_routers_do(plain: tuple[dict[str, Any], Path]) -> None:
    facts, _ = plain
    assert [row["step"] for row in facts["log"]] == [1, 2, 3, 4]
    for row in facts["log"]:
        assert row["tokens_per_second"] > 0
        # of 16 image tokens; ratios 0.75, 0.25, 0.15
        assert [row[f"layer_{i}/kept"] for i in (1, 2, 3)] == [12 / 16, 4 / 16, 2 / 16]
        assert row["layer_1/saturated"] == 0
    # routers start at zero, and have moved after a step
    assert facts["log"][0]["layer_1/logit_std"] == 0
    assert facts["log"][-1]["layer_1/router_norm"] > 0
    assert facts["log"][-1]["layer_1/logit_std"] > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_ended_goes_on_to_the_same_bits(
    plain: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    facts, output = plain
    path = tmp_path / "run.yaml"
    changes = {**TINY, "save_every": 2, "workers": workers, "output": tmp_path / "run"}
    path.write_text(render_config(load_config("demo", changes)))
    calls = iter(range(100))
    original = ConversationDataset._encode

    def encode(self: ConversationDataset, index: int) -> Any:
        if next(calls) == 5 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getppid() if workers else os.getpid(), signal.SIGTERM)
        return original(self, index)

    monkeypatch.setattr(ConversationDataset, "_encode", encode)
    assert main(["train", str(path)]) == 143
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    saved = checkpoint_folder(load_config(str(path)))
    assert any(saved.glob("checkpoint-*"))
    assert main(["train", str(path)]) == 1  # would start again beside them
    assert "resume it" in capsys.readouterr().err
    assert main(["train", str(path), "--resume"]) == 0
    assert "resumes from" in capsys.readouterr().err
    assert not saved.exists()
    again = weights(tmp_path / "run")
    assert all(torch.equal(value, again[name]) for name, value in weights(output).items())
    resumed = json.loads((tmp_path / "run" / "run.json").read_text())
    assert resumed["losses"] == facts["losses"]


def test_what_others_left_beside_a_run_stays(
    plain: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    changes = {**TINY, "steps": 1, "output": tmp_path / "run"}
    beside = checkpoint_folder(load_config("demo", changes))
    (beside / "checkpoint-9").mkdir(parents=True)  # no manifest: damaged
    (beside / "notes.txt").write_text("mine")
    train(load_config("demo", {**changes, "save_every": 1}))
    assert sorted(path.name for path in beside.iterdir()) == ["checkpoint-9", "notes.txt"]


def test_a_resumed_run_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        render_config(load_config("demo", {**TINY, "save_every": 1, "output": tmp_path / "run"}))
    )
    original = ConversationDataset.set_epoch

    def end(self: ConversationDataset, epoch: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(ConversationDataset, "set_epoch", end)
        assert main(["train", str(path)]) == 143
    capsys.readouterr()
    assert main(["train", str(path), "--resume", "--set", "learning_rate=0.002"]) == 1
    error = capsys.readouterr().err
    assert "learning_rate" in error
    assert "0.001" in error
    assert "0.002" in error
    assert main(["train", str(path), "--resume", "--set", "log_every=2"]) == 0  # may differ


def moved(before: Path, after: Path) -> set[str]:
    """Names of the parts whose weights differ."""
    old, new = weights(before), weights(after)
    parts = {"vision_tower", "multi_modal_projector", "mod_router", "lm_head", "self_attn"}
    return {
        part
        for name, value in new.items()
        for part in parts
        if part in name and (name not in old or not torch.equal(old[name], value))
    }


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (
            "everything",
            {"vision_tower", "multi_modal_projector", "mod_router", "lm_head", "self_attn"},
        ),
        ("language", {"multi_modal_projector", "mod_router", "lm_head", "self_attn"}),
        ("projector", {"multi_modal_projector"}),
        ("lora", {"multi_modal_projector", "mod_router", "self_attn"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_only_the_chosen_parts_are_trained(
    plain: tuple[dict[str, Any], Path], tmp_path: Path, trained: str, expected: set[str]
) -> None:
    _, start = plain
    output = tmp_path / "run"
    changes = {**TINY, "model": start, "trained": trained, "output": output, "steps": 2}
    facts = train(load_config("demo", changes))
    assert moved(start, output) == expected
    assert weights(output).keys() == weights(start).keys()
    assert facts["model"] == "p-MoD"


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_free": True},
        {"padding_free": True, "pmod": None},
        {"group_by_modality": True, "batch_size": 4},
        {"gradient_checkpointing": True},
        {"precision": "bfloat16"},
        {"steps": None, "epochs": 0.001},
        {"gradient_accumulation": 2},
    ],
    ids=str,
)
def test_ways_to_train(
    plain: tuple[dict[str, Any], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    facts, _ = plain
    found = train(load_config("demo", {**TINY, "output": tmp_path / "run", **changes}))
    assert found["steps"] == (2 if "epochs" in changes else 4)
    first, expected = found["losses"][0][1], facts["losses"][0][1]
    assert torch.tensor(found["losses"]).isfinite().all()
    if "batch_size" in changes:
        return
    if "precision" in changes or changes.get("pmod", 1) is None:
        # other arithmetic or another model: about the loss of a guess
        assert first == pytest.approx(expected, rel=0.1)
    elif "gradient_accumulation" not in changes and "epochs" not in changes:
        # the same batch: float32 sums in another order
        assert first == pytest.approx(expected, rel=1e-5)


def own_data(folder: Path, count: int) -> tuple[Path, Path]:
    """The first easy-VQA images with one question each, as a LLaVA json."""
    records, source = easy_vqa_records("train")
    (folder / "images").mkdir()
    for record in records[:count]:
        shutil.copy(source / record.images[0], folder / "images")
    ask = [
        {"from": "human", "value": "<image>\nwhat color is it?"},
        {"from": "gpt", "value": "red"},
    ]
    raw = [{"id": r.id, "image": r.images[0], "conversations": ask} for r in records[:count]]
    (folder / "data.json").write_text(json.dumps(raw))
    return folder / "data.json", folder / "images"


def test_broken_records_are_reported(tmp_path: Path) -> None:
    data, folder = own_data(tmp_path, 12)
    (folder / json.loads(data.read_text())[3]["image"]).unlink()
    changes = {**TINY, "data": str(data), "image_folder": str(folder), "output": tmp_path / "run"}
    with pytest.raises(InputError, match=r"record 3 .*an existing image file"):
        train(load_config("demo", changes))
    assert not (tmp_path / "run").exists()
    skip = {**changes, "on_broken": "skip", "max_broken_share": 0.1}
    facts = train(load_config("demo", skip))
    assert facts["records"] == 11
    assert facts["broken"]["counts"] == {"missing image": 1}
    with pytest.raises(InputError, match=r"expected at most 5\.0% broken records"):
        train(load_config("demo", {**skip, "max_broken_share": 0.05, "output": tmp_path / "other"}))
