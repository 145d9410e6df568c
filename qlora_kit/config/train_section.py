"""The ``train`` section: TRL's ``SFTConfig`` fields by their own names, the kit's defaults, and what is not to be set.

Fields with a default of the kit's own are declared in ``TrainSection``, once; every other ``SFTConfig`` field is taken
as it is and checked by ``undeclared_problems`` against the installed source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from qlora_kit.config.sft_fields import SftField, sft_fields
from qlora_kit.config.synonyms import meant_by, value_meant_by
from qlora_kit.metrics import METRICS
from qlora_kit.suggest import advice

SECTION = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Problem:
    """A fault of one key, before the file and line are known.

    Attributes:
        path: The key, from the top.
        what: What is wrong with it, to stand after its name.
        expected: What was expected.
        fix: What to do.
    """

    path: tuple[str, ...]
    what: str
    expected: str
    fix: str


def wrong_value(expected: str, *, known: Iterable[str] = ()) -> PydanticCustomError:
    """The error that a validator raises for a wrong value; ``known`` are the words that it may be a misspelling of."""
    context = {"expected": expected, "known": list(known)}
    return PydanticCustomError("wrong_value", "Input should be {expected}", context)


def as_names(value: object) -> tuple[str, ...]:
    """One text, a list of texts or null as a tuple of texts."""
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise wrong_value("a text or a list of texts")
    return tuple(names)


def _best_metric(value: str) -> str:
    if value == "pass@1":
        raise wrong_value(f"{EVAL_LOSS} or a metric that runs no generated code: nobody watches a training run")
    known = (EVAL_LOSS, *(name for name in METRICS if name != "pass@1"))
    if value not in known:
        raise wrong_value(f"one of {', '.join(known)}", known=known)
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(as_names)]
EVAL_LOSS = "eval_loss"


class TrainSection(BaseModel):
    """Fields of ``SFTConfig`` that the kit gives a default of its own, and the kit's own; others may stand beside."""

    model_config = SECTION | {"extra": "allow"}

    num_train_epochs: float = Field(default=3.0, gt=0)
    """How often the data is gone through."""
    max_length: int = Field(default=1024, ge=1)
    """Longest conversation, in tokens; ``data.overlength`` says what happens to longer ones."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes in one optimizer step."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate."""
    lr_scheduler_type: str = "cosine"
    """Any scheduler of transformers."""
    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps of warm-up; below 1, the share of all steps."""
    optim: str = "adamw_torch"
    """Any optimizer of transformers."""
    packing: bool = False
    """Put several conversations into one sequence of ``max_length``."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    seed: int = Field(default=42, ge=0)
    """Seed of adapter weights, order and dropout."""
    logging_steps: float = Field(default=10, gt=0)
    """Optimizer steps between two log lines."""
    report_to: Names = ("none",)
    """Where metrics go beside the run folder, such as tensorboard or wandb."""
    eval_strategy: str = "epoch"
    """When the validation loss is measured; never without validation data."""
    save_strategy: str = "epoch"
    """When a checkpoint is saved."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept; the best stays."""
    load_best_model_at_end: bool = True
    """Keep the best adapter by ``metric_for_best_model`` rather than the last one."""
    metric_for_best_model: Annotated[str, AfterValidator(_best_metric)] = EVAL_LOSS
    """What best means: ``eval_loss``, or a metric in ``metrics.METRICS`` of answers to validation rows."""
    metric_rows: int = Field(default=64, ge=1)
    """Validation rows, evenly spread, that are answered for that metric in each evaluation."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better ``metric_for_best_model``; null: never."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """An evaluation counts as better if it is better by more than this."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (Hayou et al. 2024): learning rate of ``lora_B`` over that of ``lora_A``; null: the same."""
    layerwise_lr_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Learning rate of a layer over that of the layer above it (Howard & Ruder 2018); null: the same."""
    unfreeze_layers_every: Annotated[int, Field(ge=1)] | None = None
    """Begin with the top layer's adapters, and add the next layer's after every so many optimizer steps; null: all."""
    checkpointed_layers: Annotated[int, Field(ge=1)] | None = None
    """With ``gradient_checkpointing``: how many layers, from the first on, do that; null: all."""
    shard_base: bool = False
    """With several processes (``accelerate launch``): each holds its share of the frozen base, by FSDP."""
    embedding_on_host: bool = False
    """Keep the frozen input embedding in host memory and send its rows to the GPU; for bases with an untied head."""
    memory: Literal["check", "auto", "ignore"] = "check"
    """What to do with the plan of memory: ``check`` refuses what cannot fit, ``auto`` changes micro-batch, accumulation
    and checkpointing to the fastest that fits, ``ignore`` tries anyway."""
    fast: Literal["auto", "on", "off"] = "auto"
    """``on`` trains by the kit's fused layers, attention and loss where they know the model, ``off`` by those of the
    libraries; ``auto`` is ``on``, but on a GPU, where they were not measured, it tries both first."""


_HUB = ("the kit uploads nothing", "upload the run folder with the Hub's own tools")
_PREPARED = ("the kit prepares and tokenises the data itself", "use the data section")
_PRECISION = ("the precision follows the compute dtype", "set quantization.bnb_4bit_compute_dtype")
_TOKENIZER = ("tokens and template are the base model's", "choose the base with model.base")
_LAUNCH = ("the launcher decides it", "start with accelerate launch")
_EVALUATION = ("an evaluation during training keeps only the loss", "use the eval section and qlora-kit eval")
_MODE = ("the command decides it", "remove it")
_RESUME = ("a resumed run must be exact", "remove it")
_CHECKPOINTING = ("one name serves every supported version of transformers", "set train.gradient_checkpointing")

CONTROLLED: dict[str, tuple[str, str]] = {  # field -> (why it cannot be set, what to do instead)
    "output_dir": ("the run folder has a key of its own", "set output_dir at the top level"),
    "resume_from_checkpoint": ("resuming is asked for on the command line", "use train --resume"),
    "completion_only_loss": ("the kit makes the labels", "set data.loss_on"),
    "assistant_only_loss": ("the kit makes the labels", "set data.loss_on"),
    "remove_unused_columns": _PREPARED,
    "dataset_text_field": _PREPARED,
    "dataset_kwargs": _PREPARED,
    "dataset_num_proc": _PREPARED,
    "length_column_name": _PREPARED,
    "label_names": _PREPARED,
    "truncation_mode": ("no row is cut silently", "set data.overlength"),
    "model_init_kwargs": ("the kit loads the base model", "use the sections model and quantization"),
    "trust_remote_code": ("code from a model repository is not run", "use a base whose architecture transformers has"),
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "chat_template_path": _TOKENIZER,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": ("one name serves all", "set train.gradient_checkpointing_kwargs"),
    "use_cpu": (
        "training runs on the first GPU, or on the CPU where there is none",
        "hide GPUs: CUDA_VISIBLE_DEVICES=",
    ),
    "disable_tqdm": ("the kit shows the progress itself", "remove it"),
    "eval_packing": ("validation rows are packed as training rows are", "set train.packing"),
    "auto_find_batch_size": ("it changes the effective batch", "set per_device_train_batch_size"),
    "logging_nan_inf_filter": ("a loss that is not finite stops the run", "remove it"),
    "enable_jit_checkpoint": ("the kit saves a checkpoint on Ctrl-C and SIGTERM itself", "remove it"),
    "greater_is_better": ("it follows from metric_for_best_model", "remove it"),
    "ignore_data_skip": _RESUME,
    "dataloader_in_order": _RESUME,
    "save_only_model": _RESUME,
    "do_train": _MODE,
    "do_eval": _MODE,
    "do_predict": _MODE,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "local_rank": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "deepspeed": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

# Least value (None: must be above 0) and the value that must stay below, of numbers that have no default of the kit's.
_BOUNDS: dict[str, tuple[float | None, float]] = {
    "per_device_eval_batch_size": (1, math.inf),
    "eval_steps": (None, math.inf),
    "save_steps": (None, math.inf),
    "eval_delay": (0, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (None, math.inf),
    "label_smoothing_factor": (0, 1),
    "neftune_noise_alpha": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "torch_empty_cache_steps": (1, math.inf),
    "max_steps": (-1, math.inf),
    "data_seed": (0, math.inf),
    "pad_to_multiple_of": (1, math.inf),
}


def settable_fields() -> tuple[str, ...]:
    """The names that the ``train`` section takes."""
    return (*(name for name in sft_fields() if name not in CONTROLLED), *kit_fields())


def kit_fields() -> tuple[str, ...]:
    """The names of the ``train`` section that are the kit's own and that ``SFTConfig`` does not know."""
    known = {*sft_fields(), "gradient_checkpointing"}  # the latter has another name in newer versions
    return tuple(name for name in TrainSection.model_fields if name not in known)


def undeclared_problems(train: Mapping[str, Any], *, evaluates: bool) -> list[Problem]:
    """What is wrong with the names of ``train``, and with values that ``TrainSection`` does not check.

    Args:
        train: The section as it was given.
        evaluates: Whether there is validation data.
    """
    problems = []
    for name, value in train.items():
        if name in CONTROLLED:
            reason, fix = CONTROLLED[name]
            problems.append(
                Problem(("train", name), f"cannot be set: {reason}", "a field that the kit leaves free", fix)
            )
        elif name not in sft_fields():
            if name not in TrainSection.model_fields:
                expected = "a field of TRL's SFTConfig, in the installed version"
                fix = meant_by(name, section="train") or advice(name, settable_fields())
                problems.append(Problem(("train", name), "is an unknown key", expected, fix))
        else:
            problems.extend(_value_problems(sft_fields()[name], value))
    return problems + (_strategy_problems(train) if evaluates else [])


def _value_problems(field: SftField, value: Any) -> list[Problem]:
    declared = field.name in TrainSection.model_fields
    if declared and (not field.choices or not isinstance(value, str)):
        return []  # pydantic checks it
    path = ("train", field.name)
    if not field.accepts(value):
        if isinstance(value, str) and field.choices:
            fix = value_meant_by(value, field=field.name) or advice(value, field.choices)
        else:
            fix = f"correct train.{field.name}"
        return [Problem(path, f"is {value!r}", field.expected, fix)]
    if (field.name, value) == ("packing_strategy", "wrapped"):
        what = "is 'wrapped', which cuts rows in the middle"
        return [Problem(path, what, "a strategy that keeps rows whole", "set train.packing_strategy=bfd")]
    if field.name in _BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool):
        least, limit = _BOUNDS[field.name]
        if not ((value > 0 if least is None else value >= least) and value < limit):
            expected = "a number above 0" if least is None else f"a number of at least {least:g}"
            expected += f" and below {limit:g}" if limit < math.inf else ""
            return [Problem(path, f"is {value!r}", expected, f"correct train.{field.name}")]
    return []


def _strategy_problems(train: Mapping[str, Any]) -> list[Problem]:
    """The best checkpoint can be kept only where each checkpoint has its validation loss."""
    defaults = TrainSection.model_fields

    def value(name: str) -> Any:
        return train.get(name, defaults[name].default if name in defaults else None)

    evaluate, save = value("eval_strategy"), value("save_strategy")
    if not value("load_best_model_at_end") or "no" in (evaluate, save) or save == "best":
        return []
    fix = "make them the same, or set train.load_best_model_at_end=false"
    if evaluate != save:
        key = "save_strategy" if "save_strategy" in train else "eval_strategy"
        what = f"does not fit: eval_strategy is {evaluate!r} and save_strategy is {save!r}"
        return [Problem(("train", key), what, "the same strategy for both, to keep the best adapter", fix)]
    eval_steps, save_steps = value("eval_steps") or value("logging_steps"), value("save_steps") or 500
    numbers = all(isinstance(steps, (int, float)) and steps > 0 for steps in (eval_steps, save_steps))
    if evaluate == "steps" and numbers and not _is_multiple(save_steps, eval_steps):
        key = "save_steps" if "save_steps" in train else "eval_strategy"
        what = f"does not fit: save_steps is {save_steps:g} and eval_steps is {eval_steps:g}"
        return [Problem(("train", key), what, "save_steps as a multiple of eval_steps, to keep the best adapter", fix)]
    return []


def _is_multiple(save_steps: float, eval_steps: float) -> bool:
    """Both are numbers of steps, or both are shares of all steps (below 1), and the first is a multiple."""
    if (save_steps < 1) != (eval_steps < 1):
        return False
    ratio = save_steps / eval_steps
    return ratio >= 1 and math.isclose(ratio, round(ratio))
