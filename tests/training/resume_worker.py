"""One of two gloo ranks: trains, and may fail in a save on one rank; prints losses and a digest."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import losses, make_trainer, weights


def main() -> None:
    folder, steps, resume, failing = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3] == "resume",
        int(sys.argv[4]),
    )
    torch.set_num_threads(1)
    trainer = make_trainer(folder, 5, per_device_train_batch_size=1, ddp_backend="gloo")
    rank = trainer.args.process_index
    save, save_random = trainer._save_checkpoint, trainer._save_rng_state

    def stop_early(model: Any, trial: Any) -> None:
        save(model, trial)
        trainer.control.should_training_stop = trainer.state.global_step == steps

    def fail(output_dir: str) -> None:
        if rank == failing and trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_random(output_dir)

    trainer._save_checkpoint = stop_early  # type: ignore[method-assign]
    trainer._save_rng_state = fail  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256(weights(trainer).numpy().tobytes()).hexdigest()
    result = {"losses": losses(trainer), "digest": digest, "seen": trainer.seen}
    (folder.parent / f"{folder.name}-{rank}.json").write_text(json.dumps(result))


main()
