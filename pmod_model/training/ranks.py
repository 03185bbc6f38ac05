"""Parts of a save or a start that all ranks of a training pass or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from torch import distributed
from transformers import Trainer

from pmod_model.data.errors import InputError

# torch.save reports a failed write as RuntimeError
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)


def on_first_rank(trainer: Trainer, action: Callable[[], Any]) -> Any:
    """What `action` returns on the first rank; its error ends all ranks."""
    if trainer.args.world_size <= 1:
        return action()
    box: list[Any] = [None, None]
    if trainer.is_world_process_zero():
        try:
            box[0] = action()
        except InputError as error:
            box[1] = str(error)
            distributed.broadcast_object_list(box)
            raise
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise RuntimeError(f"the first rank refused: {box[1]}")
    return box[0]


def on_all_ranks(trainer: Trainer, action: Callable[[], Any]) -> None:
    """Run a part of a save on every rank, and fail on all of them if one fails."""
    problem = None
    try:
        action()
    except SAVE_ERRORS as error:
        problem = error
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if problem is not None and (trainer.args.world_size <= 1 or sharded):
        raise problem  # the others may wait for a shard: they end when this process does
    if trainer.args.world_size <= 1:
        return
    problems: list[str | None] = [None] * trainer.args.world_size
    distributed.all_gather_object(problems, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, message in enumerate(problems):
        if message is not None:
            raise OSError(f"rank {rank}: {message}")
