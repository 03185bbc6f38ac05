"""`pmod train`: one p-MoD or dense LLaVA, trained with the Hugging Face Trainer."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from pmod_model.configuration import PModConfig
from pmod_model.data.broken import BrokenRecords
from pmod_model.data.processor import build_processor
from pmod_model.schedule import layer_ratios
from pmod_model.training.checkpoints import remove_complete
from pmod_model.training.config import PLACE, TrainConfig
from pmod_model.training.fit import Prepared, ProgressBar, RunTrainer, make_trainer, prepare
from pmod_model.training.models import build_model, load_for_training
from pmod_model.training.parts import merged
from pmod_model.training.preset import Preset
from pmod_model.training.run_folder import new_run_folder, write_run
from pmod_model.training.sources import Data, Source


def train(config: TrainConfig, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Train, and leave model, processor and `run.json` in `config.output`.

    Checkpoints lie beside it, in `checkpoint_folder(config)`, until the run is complete.

    Args:
        config: what to do.
        overwrite: whether a pmod run at `output` may be replaced.
        resume: go on from the newest complete checkpoint, if there is one.

    Returns:
        The facts of the run, as in `run.json`.

    Raises:
        InputError: the data or the checkpoint is not usable, `output` holds something else, or
            there are checkpoints and nothing is resumed; nothing is written then.
        Interrupted: a signal asked the run to end; with `save_every`, a checkpoint was written.
    """
    with _folder(config, overwrite) as folder:
        if config.threads:
            torch.set_num_threads(config.threads)
        broken = BrokenRecords(config.on_broken, config.max_broken_share)
        data = Source(config.data, config.image_folder).load("train", broken)
        set_seed(config.seed)
        model, processor = _model(config, data)
        prepared = prepare(config, processor, data, broken)
        saves = checkpoint_folder(config) if config.save_every else folder / "unsaved"
        trainer = make_trainer(config, model, processor, prepared, saves)
        fitted = _fit(trainer, resume)
        broken_records = trainer.train_dataset.report()
        facts = {**_facts(config, trainer.model, prepared), "broken": broken_records, **fitted}
        shutil.rmtree(folder / "unsaved", ignore_errors=True)
        _save(trainer, folder)
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder)
            write_run(folder, facts)
    if config.save_every and trainer.is_world_process_zero():
        remove_complete(saves)
    return facts


@contextmanager
def _folder(config: TrainConfig, overwrite: bool) -> Iterator[Path]:
    """The run folder for the first process, a temporary one for the others."""
    if int(os.environ.get("RANK", "0")) == 0:
        with new_run_folder(config.output, overwrite, PLACE) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _save(trainer: RunTrainer, folder: Path) -> None:
    """Write the model; where processes share it, each takes part."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)
    elif trainer.is_world_process_zero():
        merged(trainer.model).save_pretrained(folder)


def checkpoint_folder(config: TrainConfig) -> Path:
    """Where a run keeps what it can be resumed from: beside its output, `NAME.checkpoints`."""
    output = config.output.absolute()
    return output.with_name(f"{output.name}.checkpoints")


def _model(config: TrainConfig, data: Data) -> tuple[PreTrainedModel, Any]:
    if config.model is not None:
        return load_for_training(config.model, config.pmod, PLACE)
    sizes = Preset(config.image_size, config.patch_size, config.hidden_size, config.layers)
    processor = build_processor(data.records, config.image_size, config.patch_size)
    return build_model(sizes, processor, config.pmod), processor


def _fit(trainer: RunTrainer, resume: bool) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    bars = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressBar)]
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        for bar in bars:
            bar.close()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "losses": [[row["step"], row["loss"]] for row in log],
        "log": log,
    }


def _facts(config: TrainConfig, model: Any, prepared: Prepared) -> dict[str, Any]:
    text = model.config.get_text_config()
    pmod = getattr(model.config, "pmod", None)
    ratios = (
        {} if pmod is None else layer_ratios(PModConfig.from_dict(pmod), text.num_hidden_layers)
    )
    return {
        "model": "dense" if pmod is None else "p-MoD",
        "parameters": sum(_sizes(model)),
        "layers": text.num_hidden_layers,
        "pmod": pmod,
        "ratios": {str(layer): ratio for layer, ratio in ratios.items()},
        "source": Source(config.data, config.image_folder).to_dict(),
        "data": prepared.data.name,
        "records": len(prepared.records),
        "batch_size": config.batch_size,
        "turns": config.turns,
        "learning_rate": config.learning_rate,
        "seed": config.seed,
        "threads": torch.get_num_threads(),
        "config": config.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _sizes(model: PreTrainedModel) -> list[int]:
    tensors: list[Tensor] = list(model.parameters())
    return [tensor.numel() for tensor in tensors]
