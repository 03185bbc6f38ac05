"""A resumed run is the uninterrupted run, bit by bit; what cannot be resumed is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import leaves, losses, make_trainer, weights
from torch import Tensor
from transformers import TrainerCallback

from pmod_model.data.errors import InputError
from pmod_model.training.durable import Durability
from pmod_model.training.guards import FolderLock, Interrupted
from pmod_model.training.manifest import find_fault


def copy_until(source: Path, folder: Path, step: int) -> Path:
    """The folder as it was when the run had made `step` steps."""
    folder.mkdir(parents=True)
    for made in range(1, step + 1):
        shutil.copytree(source / f"checkpoint-{made}", folder / f"checkpoint-{made}")
    return folder


@pytest.mark.parametrize("step", range(1, 9))
def test_losses_weights_and_samples_equal_those_of_the_whole_run(
    whole_run: tuple[Path, Any], tmp_path: Path, step: int
) -> None:
    folder, whole = whole_run
    told: list[str] = []
    trainer = make_trainer(
        copy_until(folder, tmp_path / "run", step), 9, Durability(tell=told.append)
    )
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole)
    assert torch.equal(weights(trainer), weights(whole))
    assert trainer.seen == whole.seen[2 * step :]
    assert told == [
        f"pmod train: resumes from {tmp_path / 'run' / f'checkpoint-{step}'} (step {step})"
    ]


def test_every_sample_comes_once_an_epoch(whole_run: tuple[Path, Any]) -> None:
    seen = whole_run[1].seen
    for epoch in range(3):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == [(epoch, index) for index in range(6)]
    assert [index for _, index in seen[:6]] != [index for _, index in seen[6:12]]


@pytest.mark.parametrize("step", [2, 3, 7])
def test_workers_change_no_bit(whole_run: tuple[Path, Any], tmp_path: Path, step: int) -> None:
    folder, whole = whole_run
    trainer = make_trainer(copy_until(folder, tmp_path / "run", step), 9, dataloader_num_workers=2)
    collate = trainer.data_collator
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert collate is trainer.data_collator
    assert losses(trainer) == losses(whole)
    assert torch.equal(weights(trainer), weights(whole))
    assert trainer.seen == whole.seen[2 * step :]


class Spy(TrainerCallback):
    """States of a resumed trainer, at its first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.state = trainer, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.state:
            self.state = {
                "optimizer": self.trainer.optimizer.state_dict(),
                "scheduler": self.trainer.lr_scheduler.state_dict(),
                "rng": torch.random.get_rng_state(),
                "step": state.global_step,
                "epoch": state.epoch,
                "best": (state.best_metric, state.best_global_step),
                "weights": weights(self.trainer).clone(),
            }
            self.state = {
                k: v.clone() if isinstance(v, Tensor) else v for k, v in leaves(self.state).items()
            }


def test_every_leaf_of_the_state_comes_back(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    }
    trainer = make_trainer(tmp_path / "run", 2, **fields)
    trainer.prediction_step = lambda *_, **__: (
        torch.tensor(1.0 / (1 + trainer.state.global_step)),
        None,
        None,
    )
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-2"
    after = json.loads((saved / "trainer_state.json").read_text())
    assert after["best_global_step"] == 2
    assert after["best_model_checkpoint"] == str(saved)
    again = make_trainer(tmp_path / "run", 4, **{**fields, "eval_strategy": "no"})
    spy = Spy(again)
    again.add_callback(spy)
    again.train(resume_from_checkpoint=True)
    expected = leaves(
        {
            "optimizer": trainer.optimizer.state_dict(),
            "rng": torch.load(saved / "rng_state.pth", weights_only=False)["cpu"],
            "step": 2,
            "best": (trainer.state.best_metric, 2),
            "weights": weights(trainer),
        }
    )
    assert len(expected) > 100
    for name, value in expected.items():
        # the schedule is that of four steps now, and the resumed optimiser follows it
        if name.endswith(".lr"):
            continue
        got = spy.state[name]
        assert torch.equal(got, value) if isinstance(value, Tensor) else got == value, name
    assert spy.state[".scheduler.last_epoch"] == 2


def test_the_trainer_alone_would_load_no_weight_of_a_llava(whole_run: tuple[Path, Any]) -> None:
    from safetensors.torch import load_file

    saved = load_file(whole_run[0] / "checkpoint-1" / "model.safetensors")
    assert not set(saved) & set(whole_run[1].model.state_dict())


def test_a_damaged_newest_falls_back_and_says_so(
    whole_run: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_until(whole_run[0], tmp_path / "run", 4)
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    told: list[str] = []
    trainer = make_trainer(folder, 9, Durability(tell=told.append))
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole_run[1])
    assert told[0] == "pmod train: passed over checkpoint-4/optimizer.pt: expected a file, got none"
    assert (folder / "checkpoint-4.replaced-1" / "model.safetensors").is_file()
    assert find_fault(folder / "checkpoint-4") is None


def test_nothing_complete_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    told: list[str] = []
    trainer = make_trainer(tmp_path / "run", 1, Durability(tell=told.append))
    trainer.train(resume_from_checkpoint=True)
    assert told[-1] == f"pmod train: no complete checkpoint in {tmp_path / 'run'}: starts afresh"
    assert trainer.seen[0][0] == 0


def test_a_new_run_beside_old_checkpoints_is_refused(
    whole_run: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_until(whole_run[0], tmp_path / "run", 2)
    with pytest.raises(InputError, match="got checkpoint-2 of an earlier run; resume it"):
        make_trainer(folder).train()


def test_another_config_is_refused_unless_allowed(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", 1, Durability({"mean_ratio": 0.5})).train()
    with pytest.raises(
        InputError, match=r"expected config.mean_ratio = 0.5, got config.mean_ratio = 0.3"
    ):
        make_trainer(tmp_path / "run", 2, Durability({"mean_ratio": 0.3})).train(True)
    trainer = make_trainer(tmp_path / "run", 2, Durability({"mean_ratio": 0.3}, allow_change=True))
    trainer.train(True)
    assert trainer.state.global_step == 2


def test_other_weights_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", 1).train()
    trainer = make_trainer(tmp_path / "run", 2)
    del trainer.model.model.language_model.layers[1].mod_router
    with pytest.raises(InputError, match=r"weights with surplus .*mod_router"):
        trainer.train(True)


def test_a_loss_that_is_no_number_stops_before_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", 2)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * float("nan" if trainer.state.global_step else 1)
    )
    with pytest.raises(
        InputError,
        match=r"loss: expected a finite number, got NaN or infinity at step 2; lower the",
    ):
        trainer.train()
    assert weights(trainer).isfinite().all()
    assert find_fault(tmp_path / "run" / "checkpoint-1") is None


class Canary:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("canary",))


def test_no_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmod_model.training import manifest

    monkeypatch.chdir(tmp_path)
    make_trainer(tmp_path / "run", 1).train()
    saved = tmp_path / "run" / "checkpoint-1"
    facts = json.loads((saved / "manifest.json").read_text())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (saved / "manifest.json").unlink()
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(pickle.dumps(Canary(), protocol=2))
        made = manifest.Facts(1, {}, {}, 1, facts["versions"])
        manifest.write_manifest(saved, made)
        if name == "training_args.bin":
            make_trainer(tmp_path / "run", 2).train(True)
        else:
            with pytest.raises(InputError, match="expected tensors and numbers only"):
                make_trainer(tmp_path / "run", 2).train(True)
        (saved / name).write_bytes(content)
    assert not (tmp_path / "canary").exists()


HOLD = "import sys; from pathlib import Path; from pmod_model.training.guards import FolderLock; FolderLock(Path(sys.argv[1]), 'train').__enter__(); print('held', flush=True); sys.stdin.read()"


def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(
            InputError, match=rf"got one locked by pid {other.pid} on .* since 20\d\d-"
        ):
            make_trainer(tmp_path, 1).train()
        other.kill()
        other.wait()
    with FolderLock(tmp_path, "train"):
        pass


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_between_steps(
    whole_run: tuple[Path, Any], tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    trainer = make_trainer(tmp_path / "run", 9, save_strategy="no")
    compute = trainer.compute_loss

    def compute_and_signal(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signum)
        return compute(*args, **kwargs)

    trainer.compute_loss = compute_and_signal
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as ended:
        trainer.train()
    assert (ended.value.exit_code, ended.value.checkpoint) == (
        code,
        tmp_path / "run" / "checkpoint-5",
    )
    assert signal.getsignal(signum) is before
    again = make_trainer(tmp_path / "run", 9)
    again.train(True)
    assert losses(again) == losses(whole_run[1])
