"""Run folders: nothing of the user's is overwritten, nothing half-written is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmod_model.data.errors import InputError
from pmod_model.training.run_folder import (
    check_output,
    new_run_folder,
    read_run,
    write_json,
    write_run,
)


def make_run(folder: Path, value: int, overwrite: bool = False) -> None:
    with new_run_folder(folder, overwrite, "train") as staging:
        (staging / "model.safetensors").write_text(str(value))
        write_run(staging, {"value": value})


def test_run_appears_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "run", 1)
    assert read_run(tmp_path / "a" / "run", "x")["value"] == 1
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["run"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run", 1)
    assert read_run(tmp_path / "run", "x")["value"] == 1


def test_other_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"other content \(notes\.txt\)"):
            check_output(tmp_path, overwrite, "train")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_run_with_a_foreign_file_is_never_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 1)
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        make_run(run, 2, overwrite=True)
    assert read_run(run, "x")["value"] == 1


def test_run_is_replaced_only_when_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 1)
    write_json(run / "evaluation.json", {})
    with pytest.raises(InputError, match="--overwrite"):
        make_run(run, 2)
    make_run(run, 3, overwrite=True)
    assert read_run(run, "x")["value"] == 3
    assert not (run / "evaluation.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_failure_leaves_the_old_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, 1)

    def fail_halfway() -> None:
        with new_run_folder(run, True, "train") as staging:
            (staging / "half").write_text("x")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway()
    assert read_run(run, "x")["value"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_file_and_link_are_refused_as_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="not a folder"):
            check_output(tmp_path / name, True, "train")


def test_folder_without_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"format": "other"}))
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="pmod train"):
            read_run(folder, "evaluate")


def test_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
