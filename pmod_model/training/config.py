"""What `pmod train` does: typed fields, their meaning, and the YAML files that hold them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from pmod_model.configuration import PModConfig
from pmod_model.data.errors import InputError
from pmod_model.training.sources import EASY_VQA

PLACE = "train"
CONFIGS = resources.files("pmod_model.training") / "configs"


def _settings(value: Any) -> Any:
    if value is None or isinstance(value, PModConfig):
        return value
    try:
        return PModConfig.from_dict(value)
    except TypeError as error:  # pydantic collects ValueError only
        raise ValueError(str(error)) from None


Routing = Annotated[
    PModConfig, BeforeValidator(_settings), PlainSerializer(lambda config: config.to_dict())
]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TrainConfig(BaseModel):
    """What to train, on what, for how long. Immutable; `--print-config` lists every field.

    Raises:
        pydantic.ValidationError: a field is unknown, out of range, or does not fit another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    output: Path = Field(Path("runs/pmod"), description="Run folder to make.")

    data: str = Field(EASY_VQA, description='"easy-vqa", or the path of a data file.')
    image_folder: str | None = Field(None, description="Folder of the images that the file names.")
    turns: NotNegative = Field(
        6, description="Turns drawn anew from a conversation in each epoch; 0 = all, in order."
    )
    max_length: Positive = Field(
        2048, description="Longest conversation in tokens; a longer one counts as broken."
    )
    augment: tuple[Literal["flip", "shift"], ...] = Field(
        (), description="Changes of images, drawn from (seed, epoch, record)."
    )
    on_broken: Literal["error", "skip"] = Field(
        "error", description="What becomes of records that cannot be used."
    )
    max_broken_share: Share = Field(
        0.05, description="With skip: more broken records than this share are an error."
    )
    group_by_modality: bool = Field(
        False, description="Batches of either images or text alone, of similar lengths."
    )
    padding_free: bool = Field(
        False, description="Sequences of a batch one after another, without padding."
    )
    workers: NotNegative = Field(0, description="Processes that load data; 0 = the training one.")

    model: Path | None = Field(
        None, description="LLaVA or p-MoD checkpoint to start from; null = a small one, new."
    )
    image_size: Positive = Field(64, description="New model: pixels a side.")
    patch_size: Positive = Field(8, description="New model: pixels a side of a token.")
    hidden_size: Positive = Field(128, description="New model: width, a multiple of 32.")
    layers: Positive = Field(8, description="New model: layers of the decoder.")
    pmod: Routing | None = Field(
        default_factory=PModConfig,
        description="Fields of PModConfig; null trains the dense model.",
    )
    trained: Literal["everything", "language", "projector", "lora"] = Field(
        "everything",
        description="language = all but the vision tower (the paper's recipe); lora = adapters of"
        " the decoder, merged at the end, with projector and routers.",
    )
    lora_rank: Positive = Field(16, description="Rank of the adapters of lora.")

    steps: Positive | None = Field(400, description="Optimiser steps; null counts epochs.")
    epochs: float | None = Field(
        None, gt=0, description="Passes over the data, instead of steps.", allow_inf_nan=False
    )
    batch_size: Positive = Field(16, description="Conversations at a time on a device.")
    gradient_accumulation: Positive = Field(1, description="Batches of a step.")
    learning_rate: Rate = Field(1e-3, description="Peak.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up."
    )
    warmup: Share = Field(0.05, description="Share of the steps in which the rate rises.")
    weight_decay: Weight = Field(0.01, description="Of AdamW.")
    adam_beta2: Rate = Field(
        0.98, description="Of AdamW; 0.999 remembers for longer than some hundred steps."
    )
    max_grad_norm: Weight = Field(1.0, description="Longer gradients are shortened; 0 = never.")
    seed: NotNegative = Field(0, description="Of weights, order, turns and augmentation.")

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 is autocast over float32 weights."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute layers again in the backward pass; kept tokens are saved."
    )
    threads: NotNegative = Field(0, description="CPU threads; 0 leaves it to torch.")
    deepspeed: str | None = Field(
        None, description="zero1, zero2, zero3, or the path of a DeepSpeed config."
    )

    save_every: NotNegative = Field(
        0, description="Steps between checkpoints for --resume; 0 = none."
    )
    keep: int = Field(2, ge=2, description="Checkpoints that are kept.")
    log_every: NotNegative = Field(
        0, description="Steps between log entries; 0 = 60 entries, or every 10 steps of epochs."
    )
    report_to: tuple[str, ...] = Field(
        (), description="Loggers of the Trainer, e.g. tensorboard, wandb."
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_instead_of_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None:
            return {"steps": None, **values}
        return values

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps: expected either steps or epochs, got {self.steps} and {self.epochs}"
            )
        if self.trained == "lora" and self.deepspeed is not None:
            raise ValueError(
                f"trained: expected no lora with deepspeed, which keeps the parts of a layer in"
                f" several processes, got {self.deepspeed}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of image_size {self.image_size},"
                f" got {self.patch_size}"
            )
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size: expected a multiple of 32, got {self.hidden_size}")
        return self


def load_config(source: str | None = None, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The fields of a YAML file or of a preset, some of them changed.

    Args:
        source: path of a YAML file, or the name of a preset (`presets`); None = the defaults.
        changes: values that take the place of those of the file; settings in `pmod` are added to
            those of the file.

    Raises:
        InputError: there is no such file, it is not YAML, or a field or value is not allowed.
    """
    values, changes = {} if source is None else _read(source), dict(changes or {})
    if isinstance(changes.get("pmod"), Mapping):
        changes["pmod"] = {**(values.get("pmod") or {}), **changes["pmod"]}
    if not {"steps", "epochs"}.isdisjoint(changes):
        values = {name: v for name, v in values.items() if name not in ("steps", "epochs")}
    try:
        return TrainConfig.model_validate({**values, **changes})
    except ValidationError as error:
        raise _first_problem(error) from None


def presets() -> dict[str, str]:
    """Names of the configs that come with the package, and the first line of each."""
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in CONFIGS.iterdir()
        if file.name.endswith(".yaml")
    }
    return {name: text.splitlines()[0].lstrip("# ") for name, text in sorted(texts.items())}


def render_config(config: TrainConfig) -> str:
    """YAML that `load_config` reads back as `config`, with the meaning of every field."""
    values = config.model_dump(mode="json")
    lines = []
    for name, field in TrainConfig.model_fields.items():
        text = yaml.safe_dump({name: values[name]}, sort_keys=False, default_flow_style=False)
        lines.append(f"# {field.description}\n{text}")
    return "\n".join(lines)


def _read(source: str) -> dict[str, Any]:
    try:
        if source in presets():
            text = (CONFIGS / f"{source}.yaml").read_text(encoding="utf-8")
        else:
            text = Path(source).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        expected = f"a YAML file, or one of {', '.join(presets())}"
        raise InputError(PLACE, f"config {source!r}", expected, error.strerror) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = " ".join(str(error).split())
        raise InputError(PLACE, f"config {source!r}", "YAML", got) from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        expected = "field: value lines"
        raise InputError(PLACE, f"config {source!r}", expected, type(values).__name__)
    return values


def _first_problem(error: ValidationError) -> InputError:
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "see --print-config"
        return InputError(PLACE, name, "a known field", "an unknown one", hint)
    message = problem["msg"].removeprefix("Value error, ")
    if message.startswith("PModConfig: unknown field"):
        got = message.removeprefix("PModConfig: ")
        return InputError(PLACE, "pmod", "fields of PModConfig", got)
    if ": " in message:  # of a rule over several fields, or of PModConfig, which name the field
        subject, message = message.split(": ", 1)
        inner = subject == "PModConfig" and ": expected " in message
        name, message = message.split(": ", 1) if inner else (subject, message)
        name = f"pmod.{name}" if inner else "pmod" if subject == "PModConfig" else name
    expected, got, value = message.removeprefix("expected ").rpartition(", got ")
    if not got:
        return InputError(PLACE, option(name), _plain(message), repr(problem["input"]))
    return InputError(PLACE, option(name), expected, value)


def _plain(message: str) -> str:
    """What pydantic expected, without its opening."""
    expected = message.removeprefix("Input should be ").replace("a valid ", "a ")
    return f"a number {expected}" if expected.startswith(("greater", "less")) else expected


def option(name: str) -> str:
    """The option of the command line that sets this field."""
    return "--" + name.replace("_", "-")
