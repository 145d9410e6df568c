"""The sections of a config but ``train``: each key with its type, bounds, default and meaning, declared once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag

from qlora_kit.adapters.module_pattern import parse_pattern
from qlora_kit.config.train_section import SECTION, Names, as_names, wrong_value
from qlora_kit.formats import FORMATS
from qlora_kit.metrics import METRICS
from qlora_kit.tasks import template_fields

MAX_RANK = 1024
DATASET_ID = r"^(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}$"
INITIALISATIONS = ("gaussian", "eva", "loftq")
_REWRITING = ("pissa", "olora", "corda", "lora_ga")
TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


def _require_patterns(texts: Iterable[str]) -> None:
    """Refuse what the gate would refuse in the adapter once it is trained."""
    for text in texts:
        try:
            parse_pattern(text)
        except ValueError as error:
            raise wrong_value(f"a regular expression ({text!r}: {error})") from error


def _modules(value: object) -> str | tuple[str, ...]:
    """PEFT's module choice: a text is ``all-linear`` or a pattern, a list holds names."""
    if isinstance(value, str) and value:
        if value != "all-linear":
            _require_patterns([value])
        return value
    names = as_names(value)
    if not names:
        raise wrong_value("'all-linear', a pattern, or a list of module names")
    return names


def _template(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, str):
        raise wrong_value("a template in quotes, such as '{question}'")
    try:
        if template_fields(value):
            return value
    except ValueError as error:
        raise wrong_value(f"a template of plain column names in braces ({error})") from error
    raise wrong_value("a template that names at least one column in braces, such as '{question}'")


def _data_format(value: str) -> str:
    if value not in ("auto", *FORMATS):
        raise wrong_value(f"one of auto, {', '.join(FORMATS)}", known=FORMATS)
    return value


def _metrics(value: object) -> tuple[str, ...]:
    names = as_names(value)
    if not names or not METRICS.keys() >= set(names):
        raise wrong_value(f"one or more of {', '.join(METRICS)}", known=METRICS)
    return names


def _initialisation(value: object) -> object:
    if isinstance(value, bool) or value in INITIALISATIONS:
        return value
    expected = f"one of true, false, {', '.join(INITIALISATIONS)}"
    if isinstance(value, str) and value.startswith(_REWRITING):
        expected += "; this one rewrites the weights of the base, which all adapters share in 4 bits"
    raise wrong_value(expected, known=INITIALISATIONS)


def _ranks(value: dict[str, int]) -> dict[str, int]:
    _require_patterns(value)
    if not all(1 <= rank <= MAX_RANK for rank in value.values()):
        raise wrong_value(f"whole numbers of at least 1 and at most {MAX_RANK}")
    return value


def _alphas(value: dict[str, int | float]) -> dict[str, int | float]:
    _require_patterns(value)
    if any(alpha <= 0 for alpha in value.values()):
        raise wrong_value("numbers above 0")
    return value


def _token_ids(value: object) -> object:
    """PEFT's list of token ids; ``auto``, or null (also as the text ``none``) for none."""
    if value is None or value == "none":
        return None
    if value == "auto":
        return value
    ids = value if isinstance(value, list | tuple) else [value]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise wrong_value("auto, null, or a list of token ids")
    return tuple(ids)


Modules = Annotated[str | tuple[str, ...], BeforeValidator(_modules)]
Template = Annotated[str | None, BeforeValidator(_template)]
Metrics = Annotated[tuple[str, ...], BeforeValidator(_metrics)]
TokenIndices = Annotated[Literal["auto"] | tuple[int, ...] | None, BeforeValidator(_token_ids)]
RankPattern = Annotated[dict[str, int], AfterValidator(_ranks)]
AlphaPattern = Annotated[dict[str, int | float], AfterValidator(_alphas)]


class ModelSection(BaseModel):
    """The base model."""

    model_config = SECTION

    base: str = Field(default="tiny", min_length=1)
    """``tiny`` (embedded), a folder, or a Hub id (``ID`` or ``ID@REVISION``)."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """An adapter of the store ``adapters/``, or a folder, to go on from with new data; null: a new adapter."""


class QuantizationSection(BaseModel):
    """bitsandbytes' 4-bit quantization of the base while it is loaded."""

    model_config = SECTION

    load_in_4bit: bool = True
    """False trains LoRA on the 16-bit base."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit codes; NF4 is QLoRA's."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too."""
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """``auto``: bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU."""


class LoraSection(BaseModel):
    """PEFT's ``LoraConfig``."""

    model_config = SECTION

    r: int = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the adapter."""
    lora_alpha: int | float = Field(default=32, gt=0)
    """Scale: alpha / r, or alpha / sqrt(r) with ``use_rslora``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before ``lora_A``."""
    target_modules: Modules = "all-linear"
    """``all-linear``, a pattern, or a list of module names."""
    exclude_modules: Modules | None = None
    """Modules left out of ``target_modules``."""
    use_rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024)."""
    init_lora_weights: Annotated[bool | str, BeforeValidator(_initialisation)] = True
    """True: PEFT's own; ``gaussian``; ``eva``: from activations; ``loftq``: from the error of the quantization."""
    bias: Literal["none"] = "none"
    """The kit trains no biases; adapters from elsewhere that bring some are answered, adopted and merged."""
    modules_to_save: Names = ()
    """Modules trained and saved whole."""
    trainable_token_indices: TokenIndices = "auto"
    """Token ids whose rows of embedding and head are trained; ``auto``: the stop token's, where the base never was
    trained on it."""
    rank_pattern: RankPattern = {}
    """Module pattern -> its own rank."""
    alpha_pattern: AlphaPattern = {}
    """Module pattern -> its own alpha."""


class HubDataset(BaseModel):
    """A data set of the Hugging Face Hub, in place of a file."""

    model_config = SECTION

    hub: str = Field(pattern=DATASET_ID)
    """Its id, such as ``tatsu-lab/alpaca``."""
    split: str = Field(default="train", min_length=1)
    """Which of its splits."""
    subset: str | None = None
    """Which of its subsets (configurations), where it has several."""
    revision: str | None = None
    """Commit, tag or branch."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Take only the first rows."""
    streaming: bool = False
    """Read it as it flows, instead of downloading it whole first."""


# Tags tell pydantic which of the two was meant, so that only its faults are told; they are no keys of the config.
FILE_TAG, HUB_TAG = "<file>", "<hub>"


def _source_tag(value: object) -> str:
    return FILE_TAG if isinstance(value, str) else HUB_TAG


Source = Annotated[
    Annotated[str, Tag(FILE_TAG)] | Annotated[HubDataset, Tag(HUB_TAG)],
    Discriminator(_source_tag),
]


def _sources(value: object) -> object:
    """One file or data set, or a list of them, or null, as a list."""
    if value is None:
        return []
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all((isinstance(entry, str) and entry) or isinstance(entry, (dict, HubDataset)) for entry in entries):
        raise wrong_value("a file, a pattern, {hub: ID}, or a list of them")
    return entries


def _at_least_one(value: tuple[Source, ...]) -> tuple[Source, ...]:
    if not value:
        raise wrong_value("a file or a list of files")
    return value


Sources = Annotated[tuple[Source, ...], Field(strict=False), BeforeValidator(_sources)]
SomeSources = Annotated[Sources, AfterValidator(_at_least_one)]


class PartSection(BaseModel):
    """Rows of one task, in one format, and how they are put into words."""

    model_config = SECTION

    train: SomeSources
    """Training data: files (relative to the current folder, else to the YAML's), patterns, or {hub: ID}."""
    validation: Sources = ()
    """Data for the validation loss."""
    test: Sources = ()
    """Data for ``qlora-kit eval``."""
    format: Annotated[str, AfterValidator(_data_format)] = "auto"
    """A name in ``formats.FORMATS``, or ``auto``: detected from all rows."""
    system_prompt: str | None = None
    """In place of the task's; an empty text for none."""
    prompt: Template = None
    """In place of the task's template of the user turn."""
    completion: Template = None
    """In place of the task's template of the answer."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often a training row is seen in an epoch: 2 is twice, 0.5 is every second row, chosen by ``train.seed``."""

    def of(self, split: str) -> tuple[Source, ...]:
        """The files and data sets of ``train``, ``validation`` or ``test``."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


class MixedPart(PartSection):
    """Another task in the same adapter."""

    task: str = Field(pattern=TASK_NAME)
    """One of ``tasks.TASKS``, or a new name with prompt and completion."""


class DataSection(PartSection):
    """The data and how they are read; the part that is described here is the config's own ``task``."""

    mix: tuple[MixedPart, ...] = Field(default=(), strict=False)
    """More parts, of other tasks, for one adapter that does several."""
    loss_on: Literal["all_assistant", "last"] = "all_assistant"
    """Answers that are trained on: all, or the last of each conversation."""
    on_error: Literal["stop", "drop"] = "stop"
    """What to do with rows that cannot be used."""
    overlength: Literal["stop", "drop", "truncate"] = "stop"
    """What to do with rows longer than ``train.max_length``."""
    allow_leakage: bool = False
    """Go on although validation or test rows are in the training data."""
    near_duplicates: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Remove rows this similar (Jaccard similarity of word shingles) to an earlier one; null: exact copies only."""


class EvalSection(BaseModel):
    """How ``qlora-kit eval`` scores."""

    model_config = SECTION

    batch_size: int = Field(default=16, ge=1)
    """Prompts generated at once."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """In place of the task's limit of an answer, in tokens."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Score only so many rows."""
    metrics: Metrics | None = None
    """In place of the task's metrics."""
    stop_rate_rows: int = Field(default=32, ge=0, le=10_000)
    """Validation prompts that the trained adapter answers after training, to see whether it stops; 0: none."""
    report_samples: int = Field(default=4, ge=0, le=100)
    """Validation prompts that base and adapter answer after training, to be read in ``report.html``; 0: none."""
