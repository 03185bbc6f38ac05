"""What counts as a complete checkpoint: every kind of damage is found, and the file named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pmod_model.data.errors import InputError
from pmod_model.training import checkpoints
from pmod_model.training.manifest import Facts, find_fault, read_manifest


def facts(step: int, **fields: object) -> Facts:
    values = {"config": {"pmod": {"mean_ratio": 0.5}}, "data": {"sha256": "ab"}, "world_size": 1}
    return Facts(step=step, versions={"torch": "2.13"}, **{**values, **fields})  # type: ignore[arg-type]


def save(folder: Path, step: int, **fields: object) -> Path:
    source = checkpoints.new_staging(folder, step) / f"checkpoint-{step}"
    (source / "global_step").mkdir(parents=True)
    torch.save({"step": step}, source / "optimizer.pt")
    torch.save({"rng": step}, source / "rng_state.pth")
    (source / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (source / "global_step" / "shard.txt").write_text(f"{step}")
    return checkpoints.commit(source.parent, facts(step, **fields))


def test_a_save_leaves_one_complete_folder_with_all_its_facts(tmp_path: Path) -> None:
    made = save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert find_fault(made) is None
    manifest = read_manifest(made)
    assert manifest["step"] == 3
    assert manifest["files"]["model.safetensors"]["size"] == 10240
    assert sorted(manifest["files"]) == [
        "global_step/shard.txt",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
    ]
    assert checkpoints.newest_complete(tmp_path) == (made, [])


def test_each_of_200_flipped_bits_is_found_in_its_file(tmp_path: Path) -> None:
    made = save(tmp_path, 1)
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    generator = random.Random(0)
    found = 0
    for index in range(200):
        path = paths[index % len(paths)]
        content = path.read_bytes()
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(bytes(flipped))
        fault = find_fault(made)
        found += fault is not None and fault.path == path
        path.write_bytes(content)
    assert found == 200
    assert find_fault(made) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_a_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096] + bytes(4096) + path.read_bytes()[8192:])


def swap(path: Path) -> None:
    other = path.with_name("optimizer.pt")
    path.rename(path.with_name("kept"))
    other.rename(path)
    path.with_name("kept").rename(other)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "zeroed page": zero_a_page,
    "swapped files": swap,
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a link": lambda path: path.rename(path.parent.parent / "x") and path.symlink_to("../x"),
    "no manifest": lambda path: (path.parent / "manifest.json").unlink(),
    "empty manifest": lambda path: (path.parent / "manifest.json").write_text("{}"),
    "manifest is a list": lambda path: (path.parent / "manifest.json").write_text("[]"),
    "surplus file": lambda path: path.with_name("pytorch_model.bin").write_bytes(b"x"),
    "no optimizer": lambda path: path.with_name("optimizer.pt").unlink(),
    "weights only": lambda path: [item.unlink() for item in path.parent.iterdir() if item.is_file() and item != path],
    "empty folder": lambda path: [shutil.rmtree(path.parent), path.parent.mkdir()],
    "renamed": lambda path: path.parent.rename(path.parent.with_name("checkpoint-9")),
}  # fmt: skip
NAMED = {
    "surplus file": "pytorch_model.bin",
    "no optimizer": "optimizer.pt",
    **dict.fromkeys(
        ["no manifest", "empty manifest", "manifest is a list", "weights only", "empty folder"],
        "manifest.json",
    ),
    "renamed": "checkpoint-9/manifest.json",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_passed_over_kept_and_named(tmp_path: Path, kind: str) -> None:
    before, made = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[kind](made / "model.safetensors")
    named = tmp_path / "checkpoint-9" if kind == "renamed" else made
    newest, faults = checkpoints.newest_complete(tmp_path)
    assert newest == before
    assert len(faults) == 1
    assert str(faults[0].path).endswith(NAMED.get(kind, "model.safetensors"))
    with pytest.raises(InputError, match="the last complete one is checkpoint-1") as error:
        checkpoints.check_checkpoint(named, "train")
    assert faults[0].path.name in str(error.value)
    assert named.is_dir()


def test_a_newer_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pmod_model.training.manifest.VERSION", 2)
        made = save(tmp_path, 1)
    fault = find_fault(made)
    assert fault is not None
    assert (fault.expected, fault.got) == ("pmod-checkpoint 1", "pmod-checkpoint 2")


def test_the_order_is_that_of_steps_whatever_the_clock_says(tmp_path: Path) -> None:
    made = {step: save(tmp_path, step) for step in (2, 9, 10, 100)}
    for step, path in made.items():
        for item in (*path.rglob("*"), path):
            os.utime(item, (2e9 - 1e7 * step, 4e9 - 1e7 * step))
    assert checkpoints.newest_complete(tmp_path) == (made[100], [])
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_rotation_counts_complete_ones_only_and_keeps_damaged_ones(tmp_path: Path) -> None:
    made = {step: save(tmp_path, step) for step in (1, 2, 3, 4, 5)}
    truncate(made[4] / "model.safetensors")
    flipped = bytearray((made[3] / "model.safetensors").read_bytes())
    flipped[0] ^= 1
    (made[3] / "model.safetensors").write_bytes(flipped)
    checkpoints.rotate(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{n}" for n in (2, 3, 4, 5)
    ]


def test_rotation_keeps_the_best_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    made = {step: save(tmp_path, step) for step in (1, 2, 3, 4)}
    (tmp_path / "checkpoint-0.rotated").mkdir()
    checkpoints.rotate(tmp_path, keep=2, protected=made[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"checkpoint-{n}" for n in (1, 3, 4)
    ]


def test_leftovers_do_not_block_a_save_and_nothing_in_its_place_is_deleted(tmp_path: Path) -> None:
    leftover = checkpoints.new_staging(tmp_path, 5) / "checkpoint-5"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    bad = tmp_path / "checkpoint-5"
    bad.mkdir()
    (bad / "model.safetensors").write_text("precious")
    assert checkpoints.newest_complete(tmp_path)[0] is None
    made = save(tmp_path, 5)
    assert find_fault(made) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-5",
        "checkpoint-5.replaced-1",
    ]
    assert (tmp_path / "checkpoint-5.replaced-1" / "model.safetensors").read_text() == "precious"


def test_an_archive_cut_by_a_silent_full_disk_is_not_committed(tmp_path: Path) -> None:
    source = checkpoints.new_staging(tmp_path, 1) / "checkpoint-1"
    source.mkdir()
    torch.save({"a": torch.ones(100)}, source / "optimizer.pt")
    os.truncate(source / "optimizer.pt", 400)
    with pytest.raises(OSError, match="written incompletely"):
        checkpoints.commit(source.parent, facts(1))
    assert not (tmp_path / "checkpoint-1").exists()


def test_differences_are_listed_field_by_field(tmp_path: Path) -> None:
    made = save(tmp_path, 1)
    checkpoints.check_unchanged(made, facts(1), "train")
    other = facts(1, config={"pmod": {"mean_ratio": 0.3}, "lr": 1}, data="cd", world_size=2)
    with pytest.raises(InputError) as error:
        checkpoints.check_unchanged(made, other, "train")
    message = str(error.value)
    assert (
        "expected config.lr = 'nothing', config.pmod.mean_ratio = 0.5, data = 'nothing', data.sha256 = 'ab', world_size = 1"
        in message
    )
    assert (
        "got config.lr = 1, config.pmod.mean_ratio = 0.3, data = 'cd', data.sha256 = 'nothing', world_size = 2"
        in message
    )
    assert json.loads((made / "manifest.json").read_text())["config"] == {
        "pmod": {"mean_ratio": 0.5}
    }
