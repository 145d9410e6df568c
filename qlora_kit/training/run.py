"""Train one adapter: cheap checks, the 4-bit base, LoRA on it, TRL's SFTTrainer, then the published files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed
from trl import SFTConfig

from qlora_kit.atomic import full_disk_errors
from qlora_kit.base_files import BaseRef, resolve_base, resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.data.preparing import tell_notes
from qlora_kit.data.tokenised_data import TokenisedData, tokenised_data
from qlora_kit.errors import ConfigError
from qlora_kit.measured_speed import note_speed
from qlora_kit.models import (
    adapter_bytes_at_most,
    base_quantization,
    compute_dtype,
    default_device,
    load_base_model,
    load_tokenizer,
    quantization_facts,
    require_target_modules,
)
from qlora_kit.report import Sample, write_report
from qlora_kit.stop_token import TokenRows, choose_token_rows
from qlora_kit.token_rows import show_bias_of_head
from qlora_kit.training.callbacks import (
    TrainingProgress,
)
from qlora_kit.training.continuing import EarlierAdapter, with_earlier_adapter
from qlora_kit.training.contract import Trained, write_run_files
from qlora_kit.training.figures import run_figures
from qlora_kit.training.fitting import fit
from qlora_kit.training.memory_check import begun_with, within_memory
from qlora_kit.training.reporters import require_reporters
from qlora_kit.training.resuming import resume_run
from qlora_kit.training.run_folder import (
    clear_run_folder,
    leave_nothing_unfinished,
    open_run_folder,
    publish,
    require_space_for_run,
    run_folder_lock,
)
from qlora_kit.training.samples import sample_answers
from qlora_kit.training.settings import Start, portable
from qlora_kit.training.starting_adapter import AdapterStart, attach_adapter, require_fitting_start
from qlora_kit.training.stop_rate import stop_rate
from qlora_kit.training.strategies import checked_strategies

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        output_dir: The run folder.
        steps: Optimizer steps in all.
        train_loss: Mean loss over the run's last log interval.
        eval_loss: Validation loss of the adapter that was kept; None without validation data.
        task_metric: The kept adapter's ``train.metric_for_best_model``, where that is a metric of answers; else None.
        kept_step: The step whose adapter was kept.
        stopped_early: Whether ``train.early_stopping_patience`` ended the run before its last step.
        stop_rate: Share of the answers to ``eval.stop_rate_rows`` validation prompts that end by themselves; None
            where none was asked for.
        tokens_per_second: Tokens through the model, padding left out, over the training time with its evaluations.
        rows: Training rows that were kept, of those that were read.
        dropped_rows: Rows of all splits that were dropped, truncated or duplicates; ``ledger.jsonl`` lists them.
        supervised_tokens: Tokens of one epoch that the loss sees.
        trainable_parameters: Numbers trained.
        trained_token_rows: Module to the token ids whose rows of it were trained too; None for none.
        peak_bytes: Peak memory: allocated on the GPU, else resident in the process.
        resumed_from: The checkpoint it went on from, or None.
        seconds: Training time.
        history: Log lines, oldest first.
    """

    output_dir: str
    steps: int
    train_loss: float
    eval_loss: float | None
    task_metric: float | None
    kept_step: int
    stopped_early: bool
    stop_rate: float | None
    tokens_per_second: float
    rows: int
    dropped_rows: int
    supervised_tokens: int
    trainable_parameters: int
    trained_token_rows: dict[str, list[int]] | None
    peak_bytes: int
    resumed_from: str | None
    seconds: float
    history: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; the history stays in ``metrics.json``."""
        return {name: value for name, value in asdict(self).items() if name != "history"}


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: Sequence[str] = (),
    progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainResult:
    """Train the adapter that ``config`` describes and leave it in its run folder.

    Args:
        config: From ``load_config``.
        resume: Go on from the newest checkpoint of the run folder that verifies.
        overwrite: Replace an occupied run folder.
        allow_changed: Keys that may differ from what the resumed run began with.
        progress: Told after every step.

    Raises:
        ConfigError, DataError, BaseModelError, AdapterError, OutputError: Something is wrong; nothing was trained.
        GuardError: A loss, a gradient or a trained weight became non-finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    require_reporters(config.train.report_to)
    config = portable(config)
    folder = Path(config.output_dir)
    if allow_changed and not resume:
        raise ConfigError(
            "--allow-changed without --resume", expected="a run to resume", fix="leave it out, or add --resume"
        )
    open_run_folder(folder, resume=resume, overwrite=overwrite)
    described = resolve_description(config.model.base, config.model.revision)
    config = config.model_copy(update={"quantization": base_quantization(described, config.quantization)})
    tokenizer = load_tokenizer(described)
    config, earlier = with_earlier_adapter(config, described)
    data = tokenised_data(config, tokenizer)
    data.require_usable()
    tell_notes(data.ledger)
    if resume:
        config = begun_with(config, folder)
    device = default_device()
    config = within_memory(config, described, data.ledger, device=device, adapt=not resume)
    arguments = _sft_config(config, device)
    strategies = checked_strategies(config, arguments, device, tokenizer)
    ref = resolve_base(config.model.base, config.model.revision)
    start = Start.of(config, tokenizer, ref, device)
    resumption = None
    if resume:
        start, resumption = resume_run(config, folder, start, allow_changed=allow_changed)
    require_target_modules(ref, config.lora)
    require_fitting_start(config, ref, tokenizer, earlier)
    require_space_for_run(
        folder, adapter_bytes=adapter_bytes_at_most(ref, config.lora), kept_checkpoints=config.train.save_total_limit
    )
    checkpoint = None if resumption is None else resumption.checkpoint
    model, quantization = _load_model(config, ref, tokenizer, data, device=device, earlier=earlier, resumed=checkpoint)
    if resumption is None:
        with run_folder_lock(folder):
            clear_run_folder(folder)
    start.write(folder)
    try:
        with run_folder_lock(folder), full_disk_errors(folder):
            trainer, seconds = fit(
                model,
                arguments,
                tokenizer,
                (data.train, data.validation),
                strategies=strategies,
                start=start,
                resumption=resumption,
                progress=progress,
            )
            metrics = run_figures(trainer, data, seconds) | {"stop_rate": _stop_rate(model, config, data, tokenizer)}
            note_speed(config.model.base, device, metrics["tokens_per_second"])
            trained = Trained(
                config=config,
                ref=ref,
                model=model,
                tokenizer=tokenizer,
                quantization=quantization,
                ledger=data.ledger,
                metrics=metrics,
                history=tuple(trainer.state.log_history),
                continued_from=None if earlier is None else earlier.origin,
                samples=_samples(model, config, data, tokenizer),
            )
            publish(folder, lambda staging: write_run_files(trained, staging))
            write_report(folder)  # last: whatever becomes of the picture, the adapter is safe
    except BaseException:
        leave_nothing_unfinished(folder)
        raise
    return TrainResult(
        output_dir=str(folder),
        resumed_from=None if resumption is None else str(resumption.checkpoint),
        history=trained.history,
        **metrics,
    )


def _sft_config(config: RunConfig, device: torch.device) -> SFTConfig:
    """TRL's configuration: the user's fields, and those that the kit decides."""
    dtype = compute_dtype(config.quantization.bnb_4bit_compute_dtype, device)
    arguments = config.sft_arguments()
    arguments |= {
        "output_dir": config.output_dir,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        # The rows are tokenised, masked and cut already; TRL prepares them only to pack them.
        "dataset_kwargs": {"skip_prepare_dataset": not arguments["packing"]},
        "eval_packing": arguments["packing"],
    }
    try:
        return SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train: {error}",
            expected="values that TRL's SFTConfig accepts together",
            fix="correct the train section; the fields are documented with SFTConfig and TrainingArguments",
        ) from error


def _load_model(
    config: RunConfig,
    ref: BaseRef,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenisedData,
    *,
    device: torch.device,
    earlier: EarlierAdapter | None,
    resumed: Path | None,
) -> tuple[PeftModel, dict[str, Any]]:
    """The base with the first adapter on it, and the quantization facts of the untouched base."""
    rows = TokenRows({}) if earlier is not None else choose_token_rows(ref, tokenizer, config.lora)
    if rows.message is not None:
        logger.warning("%s", rows.message)
    set_seed(config.train.seed)
    base = load_base_model(ref, config.quantization, device=device)
    facts = quantization_facts(config.quantization, base)
    start = AdapterStart(earlier, data.train, tokenizer.pad_token_id, resumed, rows.indices)
    model = attach_adapter(base, config, start, ref=ref, quantization=facts)
    show_bias_of_head(model)
    return model, facts


def _stop_rate(
    model: PeftModel, config: RunConfig, data: TokenisedData, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """Of the adapter that was kept, on the first validation prompts."""
    rows = config.eval.stop_rate_rows
    if data.validation is None or not rows:
        return None
    return stop_rate(
        model,
        data.validation.select(range(min(rows, len(data.validation)))),
        stop_token_ids=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=config.task_spec().max_new_tokens,
    )


def _samples(
    model: PeftModel, config: RunConfig, data: TokenisedData, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sample, ...]:
    """Answers of the base and of the adapter that was kept, for the report."""
    if data.validation is None or not config.eval.report_samples:
        return ()
    return sample_answers(
        model,
        data.validation,
        tokenizer,
        number=config.eval.report_samples,
        stop_token_ids=stop_token_ids(tokenizer),
        max_new_tokens=config.task_spec().max_new_tokens,
    )
