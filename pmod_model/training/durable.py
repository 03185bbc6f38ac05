"""A Trainer whose checkpoints are complete or not there, and that resumes to the same bits.

`DurableCheckpoints` goes before `Trainer`, or TRL's `SFTTrainer`, in the bases of a class; the
rules are in `docs/checkpoints.md`.
"""

from __future__ import annotations

import pickle
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, distributed
from transformers import Trainer, TrainerCallback

from pmod_model.data.errors import InputError
from pmod_model.training import checkpoints
from pmod_model.training.checkpoints import Durability
from pmod_model.training.guards import FolderLock, Interrupted, StopSignals
from pmod_model.training.manifest import Facts, read_manifest
from pmod_model.training.ranks import SAVE_ERRORS, on_all_ranks, on_first_rank
from pmod_model.training.restoring import load_weights, random_states_kept, set_epoch
from pmod_ops import __version__

PLACE = "train"
STATE_FILE = "trainer_state.json"


class _BetweenSteps(TrainerCallback):
    """Stops for a loss that is no number before it reaches the weights, and for signals after."""

    def __init__(self, trainer: DurableCheckpoints) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.agree_before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stop_signal:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.stop_signal:
            control.should_evaluate = False


# a mixin: only a type checker sees it as a Trainer
_Base: Any = Trainer if TYPE_CHECKING else object


class DurableCheckpoints(_Base):
    """Mixin that gives a Trainer the checkpoints of `pmod_model.training.checkpoints`.

    Args:
        *args: of the Trainer.
        durable: fingerprints and policies.
        **kwargs: of the Trainer.

    Raises:
        InputError: the arguments exclude checkpoints to resume from.
    """

    def __init__(self, *args: Any, durable: Durability | None = None, **kwargs: Any) -> None:
        self.durable = durable or Durability()
        self.stop_signal = 0
        self._signals = StopSignals()
        self._nonfinite: Tensor | None = None
        self._staging: Path | None = None
        self._last: Path | None = None
        super().__init__(*args, **kwargs)
        for name in ("save_only_model", "save_on_each_node"):
            if getattr(self.args, name):
                raise InputError(PLACE, name, "False, for checkpoints to resume from", True)
        self.add_callback(_BetweenSteps(self))

    # resume

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        *args: Any,
        **kw: Any,
    ) -> Any:
        """Train as the Trainer does.

        Args:
            resume_from_checkpoint: True goes on from the newest complete checkpoint, or afresh if
                there is none; a path goes on from that one.
            trial: of a search of hyperparameters.
            *args: of the Trainer.
            **kw: of the Trainer.

        Raises:
            InputError: the folder is in use, or holds checkpoints and nothing is resumed; the
                checkpoint is damaged or of another run; a loss is not finite; a save failed.
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        """
        folder = Path(self._get_output_dir(trial))
        self.stop_signal, self._nonfinite, self._last = 0, None, None
        with ExitStack() as stack:
            start = on_first_rank(self, lambda: self._begin(stack, folder, resume_from_checkpoint))
            self._last = start
            self._signals = stack.enter_context(StopSignals())
            try:
                result = super().train(None if start is None else str(start), trial, *args, **kw)
            except pickle.UnpicklingError as error:
                expected = "tensors and numbers only"
                raise InputError(PLACE, f"resume from {start}", expected, error) from None
            except RuntimeError as error:
                # a group-wide SIGTERM ends the loader's workers before the step
                if "DataLoader worker" in str(error) and self._signals.signum:
                    raise Interrupted(self._signals.signum, self._last) from error
                raise
        if self.stop_signal and self.state.global_step < self.state.max_steps:
            raise Interrupted(self.stop_signal, self._last)
        return result

    def _begin(self, stack: ExitStack, folder: Path, resume: str | bool | None) -> Path | None:
        """Lock the folder and choose where to start, on the first rank."""
        stack.enter_context(FolderLock(folder, PLACE))
        newest, faults = checkpoints.newest_complete(folder)
        if isinstance(resume, str):
            start = Path(resume)
            checkpoints.check_checkpoint(start, PLACE)
        elif resume:
            start = newest
            for fault in faults:
                self.durable.tell(f"pmod {PLACE}: passed over {fault}")
        else:
            start = None
        inside = start is not None and start.resolve().parent == folder.resolve()
        if newest is not None and not inside:
            got = f"{newest.name} of an earlier run"
            hint = "resume it, or choose another folder"
            raise InputError(PLACE, f"folder {str(folder)!r}", "no complete checkpoint", got, hint)
        if start is None:
            if resume:
                self.durable.tell(
                    f"pmod {PLACE}: no complete checkpoint in {folder}: starts afresh"
                )
            return None
        step = int(read_manifest(start)["step"])
        if not self.durable.allow_change:
            checkpoints.check_unchanged(start, self._facts(step), PLACE)
        self.durable.tell(f"pmod {PLACE}: resumes from {start} (step {step})")
        if inside:
            for later, path in checkpoints.checkpoints_in(folder):
                if later > step and isinstance(resume, str):
                    place = checkpoints.set_aside(path)
                    self.durable.tell(
                        f"pmod {PLACE}: {path.name} is later: renamed to {place.name}"
                    )
        return start

    def _facts(self, step: int) -> Facts:
        versions = {
            "pmod": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        world = int(self.args.world_size)
        return Facts(step, self.durable.config, self.durable.data, world, versions)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if not load_weights(target, Path(resume_from_checkpoint), PLACE):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not load_weights(self.model, best, PLACE):
            super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # A loader that skips the batches already seen hides the sampler and the data set from
        # accelerate's set_epoch: https://github.com/huggingface/transformers/issues/40691
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # a loader draws from the global generators: the steps after must not depend on evaluations
        with random_states_kept():
            return super()._evaluate(*args, **kwargs)

    # steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; notes whether the loss is finite."""
        loss = super().training_step(*args, **kwargs)
        bad = ~loss.detach().isfinite().all()
        self._nonfinite = bad if self._nonfinite is None else self._nonfinite | bad
        return loss

    def agree_before_step(self) -> None:
        """Tell all ranks of a loss that is not finite and of a signal.

        Raises:
            InputError: the loss of this step is not finite on some rank.
        """
        bad = torch.zeros((), dtype=torch.bool) if self._nonfinite is None else self._nonfinite
        self._nonfinite = None
        flags = torch.stack((bad.int(), torch.full_like(bad.int(), self._signals.signum)))
        if self.args.world_size > 1:
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        nonfinite, self.stop_signal = flags.tolist()
        if nonfinite:
            got = f"NaN or infinity at step {self.state.global_step + 1}"
            raise InputError(PLACE, "loss", "a finite number", got, "lower the learning rate")

    # save

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        step = self.state.global_step
        final = folder / checkpoints.checkpoint_name(step)
        if final == self._last:
            return  # an epoch's end after the save of its last step
        best = self.state.best_model_checkpoint
        staging = folder / (final.name + checkpoints.UNFINISHED)
        first = self.is_world_process_zero()
        try:
            on_all_ranks(self, lambda: first and checkpoints.new_staging(folder, step))
            on_all_ranks(self, lambda: self._write(staging, model, trial))
            on_all_ranks(self, lambda: first and checkpoints.commit(staging, self._facts(step)))
            self._last = final
            on_all_ranks(self, lambda: first and self._rotate(folder))
        except SAVE_ERRORS as error:
            if self._last != final:
                self.state.best_model_checkpoint = best
            self._refuse_or_warn(staging, final, error)
            return
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _write(self, staging: Path, model: Any, trial: Any) -> None:
        """Let the Trainer write its files into the staging folder, this rank's share of them."""
        state, folder = self.state, staging.parent
        best = state.best_global_step
        name = None if best is None else checkpoints.checkpoint_name(best)
        if name is not None and (best == state.global_step or (folder / name).is_dir()):
            state.best_model_checkpoint = str(folder / name)
        self._staging = staging
        # Else the Trainer looks for the best checkpoint in the staging folder, behind a barrier
        # that a rank with a full disk never reaches.
        state.best_global_step = None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
            state.best_global_step = best
        if self.args.should_save:
            state.save_to_json(
                str(staging / checkpoints.checkpoint_name(state.global_step) / STATE_FILE)
            )
        if self.is_local_process_zero() and not self.is_world_process_zero():
            for path in staging.rglob("*"):  # a machine flushes what it wrote itself
                checkpoints.sync(path)

    def _rotate(self, folder: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is not None and limit > 0:
            checkpoints.rotate(folder, limit, None if best is None else Path(best))

    def _refuse_or_warn(self, staging: Path, final: Path, error: Exception) -> None:
        partial = checkpoints.size_of(staging)
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        last = 0 if self._last is None else checkpoints.size_of(self._last)
        needed = max(partial, last or 3 * weights)  # Adam keeps two moments beside the weights
        free = shutil.disk_usage(final.parent).free
        kept = (
            "none was made" if self._last is None else f"the last complete one is {self._last.name}"
        )
        problem = InputError(
            PLACE,
            f"save of {final}",
            f"about {needed:,} bytes to write",
            f"{free:,} free and the error {str(error)!r}",
            f"earlier checkpoints are as they were: {kept}",
        )
        if self.durable.on_save_error == "stop":
            raise problem from error
        self.durable.tell(f"{problem}; training goes on")


class DurableTrainer(DurableCheckpoints, Trainer):
    """The Hugging Face Trainer with durable checkpoints."""
