"""Train one adapter: cheap checks, the 4-bit base, LoRA on it, TRL's SFTTrainer, then the published files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from qlora_kit.atomic import full_disk_errors
from qlora_kit.base_files import BaseRef, resolve_base, resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.data.preparing import tell_notes
from qlora_kit.data.tokenised_data import TokenisedData, tokenised_data
from qlora_kit.errors import ConfigError
from qlora_kit.launched import is_main_process
from qlora_kit.lora_modules import require_lora_modules
from qlora_kit.measured_speed import note_speed
from qlora_kit.models import (
    adapter_bytes_at_most,
    base_quantization,
    default_device,
    load_base_model,
    load_tokenizer,
    quantization_facts,
)
from qlora_kit.report import Sample, write_report
from qlora_kit.stop_token import TokenRows, choose_token_rows
from qlora_kit.token_rows import show_bias_of_head
from qlora_kit.training.checkpointed_layers import require_layers
from qlora_kit.training.context import tell_beyond_context
from qlora_kit.training.continuing import EarlierAdapter, with_earlier_adapter
from qlora_kit.training.contract import Trained, write_run_files
from qlora_kit.training.figures import run_figures
from qlora_kit.training.fitting import fit
from qlora_kit.training.host_embedding import (
    put_embedding_on_host,
    require_frozen_rows,
    require_host_embedding_possible,
)
from qlora_kit.training.memory_check import begun_with, within_memory
from qlora_kit.training.processes import from_main, join_processes, main_first
from qlora_kit.training.progress import TrainingProgress
from qlora_kit.training.reporters import require_reporters
from qlora_kit.training.resuming import resume_run
from qlora_kit.training.run_facts import StopRequested
from qlora_kit.training.run_folder import (
    clear_run_folder,
    leave_nothing_unfinished,
    open_run_folder,
    publish,
    require_space_for_run,
    run_folder_lock,
)
from qlora_kit.training.samples import sample_answers
from qlora_kit.training.schedule import check_schedule, steps_of_run
from qlora_kit.training.serving import require_servable
from qlora_kit.training.settings import Start, portable
from qlora_kit.training.sharding import require_shardable
from qlora_kit.training.starting_adapter import AdapterStart, attach_adapter, require_fitting_start
from qlora_kit.training.stop_rate import stop_rate
from qlora_kit.training.stopping import StopOnSignal
from qlora_kit.training.strategies import checked_strategies
from qlora_kit.training.trl_arguments import sft_config

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
        fused: Whether layers, attention or loss were the kit's fused ones (``train.fast``).
        tokens_per_second: Tokens through the model, padding left out, over the training time with its evaluations.
        rows: Training rows that were kept, of those that were read.
        dropped_rows: Rows of all splits that were dropped, truncated or duplicates; ``ledger.jsonl`` lists them.
        supervised_tokens: Tokens of one epoch that the loss sees.
        trainable_parameters: Numbers trained.
        trained_token_rows: Module to the token ids whose rows of it were trained too; None for none.
        peak_bytes: Peak memory of the main process: allocated on its GPU, else resident.
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
    fused: bool
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
    device = default_device()
    join_processes(device)
    from_main(lambda: open_run_folder(folder, resume=resume, overwrite=overwrite))
    described = main_first(lambda: resolve_description(config.model.base, config.model.revision))
    config = config.model_copy(update={"quantization": base_quantization(described, config.quantization)})
    tokenizer = load_tokenizer(described)
    config, earlier = with_earlier_adapter(config, described)
    require_servable(config, described)
    data = main_first(lambda: _usable_data(config, tokenizer))
    tell_notes(data.ledger)
    tell_beyond_context(described, data.ledger)
    if resume:
        config = begun_with(config, folder)
    config = from_main(lambda: within_memory(config, described, data.ledger, device=device, adapt=not resume))
    arguments = sft_config(config, device)
    strategies = checked_strategies(config, arguments, device, tokenizer)
    if data.train is not None and not config.train.packing:  # `fit` knows how many sequences packing makes
        steps = steps_of_run(arguments, len(data.train), processes=arguments.world_size)
        check_schedule(config.train, arguments, steps)
    ref = main_first(lambda: resolve_base(config.model.base, config.model.revision))
    start = Start.of(config, tokenizer, ref, device)
    resumption = None
    if resume:
        now = start
        start, resumption = main_first(lambda: resume_run(config, folder, now, allow_changed=allow_changed))
    require_lora_modules(ref, config.lora, load_in_4bit=config.quantization.load_in_4bit)
    require_layers(config.train, ref)
    require_shardable(config, ref)
    require_host_embedding_possible(config, ref)
    require_fitting_start(config, ref, tokenizer, earlier)
    require_space_for_run(
        folder, adapter_bytes=adapter_bytes_at_most(ref, config.lora), kept_checkpoints=config.train.save_total_limit
    )
    checkpoint = None if resumption is None else resumption.checkpoint
    model, quantization = _load_model(config, ref, tokenizer, data, device=device, earlier=earlier, resumed=checkpoint)
    from_main(lambda: _begin(folder, start, anew=resumption is None))
    stop = StopOnSignal()
    try:
        with run_folder_lock(folder), full_disk_errors(folder):
            trainer, seconds = fit(
                model,
                arguments,
                tokenizer,
                (data.train, data.validation),
                strategies=strategies,
                start=start,
                stop=stop,
                resumption=resumption,
                progress=progress,
            )
            trained = Trained(
                config=config,
                ref=ref,
                model=model,
                tokenizer=tokenizer,
                quantization=quantization,
                ledger=data.ledger,
                metrics=run_figures(trainer, data, seconds),
                history=tuple(trainer.state.log_history),
                continued_from=None if earlier is None else earlier.origin,
            )
            metrics = from_main(lambda: _publish(folder, trained, data, stop))
    except BaseException:
        if is_main_process():
            leave_nothing_unfinished(folder)
        raise
    return TrainResult(
        output_dir=str(folder),
        resumed_from=None if resumption is None else str(resumption.checkpoint),
        history=trained.history,
        **metrics,
    )


def _usable_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TokenisedData:
    data = tokenised_data(config, tokenizer)
    data.require_usable()
    return data


def _begin(folder: Path, start: Start, *, anew: bool) -> None:
    """Empty the run folder if the run begins anew, and note there what it begins with."""
    if anew:
        with run_folder_lock(folder):
            clear_run_folder(folder)
    start.write(folder)


def _publish(folder: Path, trained: Trained, data: TokenisedData, stop: StopOnSignal) -> dict[str, Any]:
    """Write the run's files, let the kept adapter answer, and write them with its answers; the figures of the run.

    Raises:
        Interrupted: SIGINT or SIGTERM came while it answered; what was trained is complete.
    """
    note_speed(trained.config.model.base, trained.model.device, trained.metrics["tokens_per_second"])
    metrics = trained.metrics | {"stop_rate": None}
    if data.validation is not None:
        without = replace(trained, metrics=metrics)
        publish(folder, lambda staging: write_run_files(without, staging))
    try:
        with stop.listening():
            metrics |= {"stop_rate": _stop_rate(trained, data, stop.raise_if_wanted)}
            complete = replace(trained, metrics=metrics, samples=_samples(trained, data, stop.raise_if_wanted))
    except StopRequested:
        write_report(folder)
        raise stop.after_the_last_step(folder) from None
    publish(folder, lambda staging: write_run_files(complete, staging))
    write_report(folder)  # last: whatever becomes of the picture, the adapter is safe
    return metrics


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
    require_servable(config, ref, tuple(rows.indices))
    require_frozen_rows(config, rows.indices)
    set_seed(config.train.seed)
    base = load_base_model(ref, config.quantization, device=device, shardable=config.train.shard_base)
    facts = quantization_facts(config.quantization, base)
    if config.train.embedding_on_host:
        put_embedding_on_host(base)
    start = AdapterStart(earlier, data.train, tokenizer.pad_token_id, resumed, rows.indices)
    model = attach_adapter(base, config, start, ref=ref, quantization=facts)
    show_bias_of_head(model)
    return model, facts


def _stop_rate(trained: Trained, data: TokenisedData, interrupt: Callable[[], None]) -> float | None:
    """Of the adapter that was kept, on the first validation prompts."""
    rows = trained.config.eval.stop_rate_rows
    if data.validation is None or not rows or trained.config.train.shard_base:
        return None
    return stop_rate(
        trained.model,
        data.validation.select(range(min(rows, len(data.validation)))),
        stop_token_ids=stop_token_ids(trained.tokenizer),
        pad_token_id=trained.tokenizer.pad_token_id,
        max_new_tokens=trained.config.task_spec().max_new_tokens,
        interrupt=interrupt,
    )


def _samples(trained: Trained, data: TokenisedData, interrupt: Callable[[], None]) -> tuple[Sample, ...]:
    """Answers of the base and of the adapter that was kept, for the report."""
    if data.validation is None or not trained.config.eval.report_samples or trained.config.train.shard_base:
        return ()
    return sample_answers(
        trained.model,
        data.validation,
        trained.tokenizer,
        number=trained.config.eval.report_samples,
        stop_token_ids=stop_token_ids(trained.tokenizer),
        max_new_tokens=trained.config.task_spec().max_new_tokens,
        interrupt=interrupt,
    )
