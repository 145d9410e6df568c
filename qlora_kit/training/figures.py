"""The figures of a finished run: its trainer and its data in, what ``metrics.json`` and the contract hold out."""

from __future__ import annotations

import math
from typing import Any

from qlora_kit.data.tokenised_data import TokenisedData
from qlora_kit.models import trainable_parameters
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.peak_memory import peak_memory_bytes


def run_figures(trainer: GuardedTrainer, data: TokenisedData, seconds: float) -> dict[str, Any]:
    """The figures of a run that took ``seconds``, as ``TrainResult`` names them."""
    report = data.ledger.report()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    state = trainer.state
    keeps_best = trainer.args.load_best_model_at_end and state.best_global_step is not None
    kept_step = state.best_global_step if keeps_best else state.global_step
    evaluated = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    kept = evaluated.get(kept_step) or (list(evaluated.values())[-1] if evaluated else {})
    measured = None if trainer.task_metric is None else kept.get(trainer.task_metric.key)
    return {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else trainer.state.log_history[-1]["train_loss"],
        "eval_loss": kept.get("eval_loss"),
        # A perplexity may be infinite, which JSON does not have.
        "task_metric": measured if measured is not None and math.isfinite(measured) else None,
        "kept_step": kept_step,
        "stopped_early": state.global_step < state.max_steps,
        "fused": trainer.was_fused,
        "tokens_per_second": round(trainer.tokens_seen / seconds, 1),
        "rows": data.ledger.report("train").kept,
        "dropped_rows": report.dropped + report.truncated + report.duplicates,
        "supervised_tokens": data.ledger.supervised_tokens["train"],
        "trainable_parameters": trainable_parameters(trainer.model),
        "trained_token_rows": trainer.model.peft_config["default"].trainable_token_indices,
        "peak_bytes": peak_memory_bytes(),
        "seconds": round(seconds, 2),
    }
