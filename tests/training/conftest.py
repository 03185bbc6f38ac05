"""Makes the helpers of this folder importable, and one folder with the checkpoints of a whole run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Three epochs of three steps, a checkpoint after each step."""
    from tiny import make_trainer

    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = make_trainer(folder, steps=9)
    trainer.train()
    return folder, trainer
