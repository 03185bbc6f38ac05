"""The command line: a run from training to report, speed of the help, and errors of one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.utils import logging

from pmod_model.cli import main
from pmod_model.configuration import PModConfig
from pmod_model.data.dataset import ConversationDataset
from pmod_model.report import prefill
from pmod_model.training.models import build_model
from pmod_model.training.preset import Preset

UserData = Callable[[int], tuple[Path, Path]]
TINY = ["--steps", "2", "--batch-size", "4"]
TINY += ["--set", "turns=3", "--set", "hidden_size=32", "--set", "layers=4"]


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """Restore what the command silences."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.enable_progress_bar()


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 1) -> str:
    """The one line that `pmod arguments` leaves on stderr, after the progress bar if there was one."""
    assert main(arguments) == status
    bar, _, line = capsys.readouterr().err.strip().rpartition("\n")
    assert not bar or "it/s]" in bar, bar
    assert "Traceback" not in line
    return line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `pmod` and `dense`, trained for two steps on easy-VQA."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("pmod", []), ("dense", ["--dense"])):
        assert main(["train", "--output", str(folder / name), *TINY, *options]) == 0
    return folder


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from pmod_model.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("train", "generate", "evaluate", "report", "view"))


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "report", "view"])
def test_help_of_a_command_shows_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: pmod {command}" in " ".join(capsys.readouterr().out.split())


def test_from_training_to_report(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "SECONDS", 0.1)
    facts = json.loads((runs / "pmod" / "run.json").read_text())
    assert facts["model"] == "p-MoD"
    assert facts["ratios"] == pytest.approx({"1": 0.75, "2": 0.25, "3": 0.15})
    assert sorted(entry.name for entry in (runs / "pmod").iterdir()) == facts["files"]
    assert not list((runs / "pmod").glob("*.bin"))
    for name in ("pmod", "dense"):
        arguments = [
            "evaluate",
            "--model",
            str(runs / name),
            "--limit",
            "6",
            "--max-new-tokens",
            "2",
        ]
        assert main(arguments) == 0
        evaluation = json.loads((runs / name / "evaluation.json").read_text())
        assert evaluation["total"] == 6
    arguments = ["generate", "--model", str(runs / "pmod"), "--image", "easy-vqa:3"]
    assert main([*arguments, "--prompt", "what color is it?", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    page = tmp_path / "report.html"
    arguments = ["report", str(runs / "pmod"), str(runs / "dense"), "--output", str(page)]
    assert main([*arguments, "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert str(page) in shown.replace("\n", "")
    text = page.read_text()
    assert text.count('class="example"') == 2
    pictures = 1 + 1 + 3  # the image, the dense layer, the routed layers
    assert text.count("data:image/png;base64,") == 2 * pictures
    assert "not recorded" not in text


def test_a_model_is_evaluated_at_other_ratios(runs: Path, tmp_path: Path) -> None:
    kept = {entry.name: entry.read_bytes() for entry in (runs / "pmod").iterdir()}
    output = tmp_path / "lower.json"
    arguments = ["evaluate", "--model", str(runs / "pmod"), "--limit", "4", "--max-new-tokens", "1"]
    arguments += ["--ratios", "mean_ratio=0.3", "--ratios", "min_ratio=0.1"]
    assert main([*arguments, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["ratios"] == pytest.approx({"1": 0.55, "2": 0.1, "3": 0.1})
    assert found["total"] == 4
    assert {e.name: e.read_bytes() for e in (runs / "pmod").iterdir()} == kept


def test_twins_start_from_the_same_weights(processor: Any) -> None:
    states = []
    for pmod in (PModConfig(), None):
        set_seed(3)
        states.append(build_model(Preset(hidden_size=32, layers=4), processor, pmod).state_dict())
    with_routers, dense = states
    assert dense.keys() < with_routers.keys()
    assert all(torch.equal(with_routers[name], value) for name, value in dense.items())


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(runs / "dense", folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        tensors = load_file(weights)
        lost = sorted(tensors)[0]
        save_file({k: v for k, v in tensors.items() if k != lost}, weights, {"format": "pt"})
    else:
        weights.write_bytes(weights.read_bytes()[:10_000])
    ask = ["--image", "easy-vqa:3", "--prompt", "what color is the shape?"]
    line = fails(capsys, ["generate", "--model", str(folder), *ask])
    assert "expected complete weights" in line


def test_runs_that_are_not_twins_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(runs / "dense", folder)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "seed": 7}))
    line = fails(
        capsys, ["report", str(runs / "pmod"), str(folder), "--output", str(tmp_path / "r")]
    )
    assert "expected runs with the same seed, got 0 and 7" in line


def test_training_is_repeatable(runs: Path, tmp_path: Path) -> None:
    assert main(["train", "--output", str(tmp_path / "again"), *TINY]) == 0
    first, again = (f / "model.safetensors" for f in (runs / "pmod", tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_users_own_data_and_checkpoint(
    runs: Path,
    tmp_path: Path,
    user_data: UserData,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    epochs: set[int] = set()
    monkeypatch.setattr(ConversationDataset, "set_epoch", lambda self, epoch: epochs.add(epoch))
    data, folder = user_data(4)
    own = ["--data", str(data), "--image-folder", str(folder)]
    arguments = ["train", "--output", str(tmp_path / "own"), "--model", str(runs / "dense")]
    assert main([*arguments, *own, *TINY[:4], "--pmod", "mean_ratio=0.3"]) == 0
    facts = json.loads((tmp_path / "own" / "run.json").read_text())
    assert facts["pmod"]["mean_ratio"] == 0.3
    assert epochs == {0, 1}  # two steps of all four records: turns are drawn anew
    assert main(["evaluate", "--model", str(tmp_path / "own"), *own, "--max-new-tokens", "1"]) == 0
    line = fails(capsys, ["evaluate", "--model", str(tmp_path / "own")])
    assert "--data: expected a file of held-out questions" in line


BAD_OPTIONS = [
    ("{train} --pmod mean_ration=1", 1, 'unknown field "mean_ration"; did you mean "mean_ratio"'),
    ("{train} --pmod mean_ratio=1.5", 1, "mean-ratio: expected a number in [0, 1], got 1.5"),
    ("{train} --pmod mean_ratio", 2, "expected field=value"),
    ("{train} --dense --pmod mean_ratio=1", 2, "--pmod: expected no settings with --dense"),
    ("{train} --steps 0", 1, "--steps: expected a number greater than or equal to 1, got 0"),
    ("{train} --steps x", 2, "--steps"),
    ("{train} --learning-rate nan", 1, "--learning-rate: expected a finite number, got nan"),
    ("{train} --set patch_size=7", 1, "--patch-size: expected a divisor of image_size 64, got 7"),
    ("{train} --set patch_sizes=7", 1, "expected a known field, got an unknown one; did you mean"),
    ("{train} --set patch_size", 2, "--set: expected field=value"),
    ("{train} absent.yaml", 1, "config 'absent.yaml': expected a YAML file, or one of demo"),
    ("{train} --data absent.json", 1, "absent.json"),
    ("{train} --model absent", 1, "expected a folder with a saved model"),
    ("{train} --model {runs}/pmod --dense", 1, "a dense model with --dense, got a p-MoD model"),
    ("{ask} --prompt ''", 1, "--prompt: expected a question, got ''"),
    (
        "{ask} --prompt color --max-new-tokens 0",
        1,
        "--max-new-tokens: expected an integer >= 1, got 0",
    ),
    ("{ask} --prompt color --max-new-tokens 5000", 1, "prompt: expected at most 2048 tokens"),
    ("{ask} --prompt color --threads -1", 2, "--threads: expected an integer >= 0, got -1"),
    ("generate --model x --prompt x --image absent.png", 1, "absent.png"),
    ("generate --model x --prompt x --image easy-vqa:x", 1, "--image: expected easy-vqa:NUMBER"),
    ("generate --image x", 2, "Missing option"),
    ("evaluate --model {runs}", 1, "expected a folder made by pmod train"),
    ("evaluate --model {runs}/pmod --limit -1", 1, "--limit"),
    ("evaluate --model {runs}/pmod --limit 2 --ratios mean_ratios=1", 1, "set_ratios: mean_ratios"),
    ("evaluate --model {runs}/dense --limit 2 --ratios mean_ratio=1", 1, "expected a p-MoD model"),
    ("report {runs}/dense {runs}/pmod", 1, "expected a p-MoD run, got a dense run"),
    ("report {runs}/pmod {runs}/dense --examples 0", 1, "--examples"),
    ("report {runs}/pmod {runs}/dense --measure", 2, "--measure: expected one model, got two"),
    ("report absent --text-tokens 5", 1, "MODEL 'absent': expected a folder with a config.json"),
    ("nonsense", 2, "nonsense"),
]


@pytest.mark.parametrize(("command", "status", "message"), BAD_OPTIONS)
def test_bad_option_is_named(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = f"generate --model {runs}/pmod --image easy-vqa:3"
    arguments = shlex.split(command.format(train="train --output new", ask=ask, runs=runs))
    line = fails(capsys, arguments, status)
    assert line.startswith("pmod"), line
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_overwritten(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    line = fails(capsys, ["report", str(runs / "pmod"), str(runs / "dense"), "--output", str(page)])
    assert str(page) in line
    assert page.read_text() == "mine"
    line = fails(capsys, ["train", "--output", str(tmp_path), "--overwrite"])
    assert "report.html" in line


def test_terminated_training_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(self: ConversationDataset, epoch: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ConversationDataset, "set_epoch", terminate)
    line = fails(capsys, ["train", "--output", str(tmp_path / "run"), *TINY], 143)
    assert line == "pmod train: training ended by SIGTERM; nothing was left behind"
    assert list(tmp_path.iterdir()) == []


def test_damaged_data_leaves_nothing(
    tmp_path: Path, user_data: UserData, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = user_data(4)
    before = sorted(tmp_path.iterdir())
    own = ["train", "--output", str(tmp_path / "run")]
    own += ["--data", str(data), "--image-folder", str(folder)]
    picture = next(folder.iterdir())
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-30])
    line = fails(capsys, [*own, *TINY])
    assert picture.name in line
    assert "a complete, readable image" in line
    assert "record" in line
    picture.unlink()
    assert "an existing image file" in fails(capsys, [*own, *TINY])
    assert sorted(tmp_path.iterdir()) == before
