"""What other trainers call the keys of a config and their values: a foreign name in, the one that is meant out."""

from __future__ import annotations

KEYS: dict[str, str] = {  # name elsewhere -> dotted key here
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "val_batch_size": "train.per_device_eval_batch_size",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "iters": "train.max_steps",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "lr": "train.learning_rate",
    "learn_rate": "train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_schedule": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "optimizer": "train.optim",
    "grad_accum": "train.gradient_accumulation_steps",
    "grad_accumulation": "train.gradient_accumulation_steps",
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_checkpoint": "train.gradient_checkpointing",
    "grad_checkpointing": "train.gradient_checkpointing",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "sequence_len": "train.max_length",
    "seq_length": "train.max_length",
    "seq_len": "train.max_length",
    "cutoff_len": "train.max_length",
    "context_length": "train.max_length",
    "sample_packing": "train.packing",
    "neftune_alpha": "train.neftune_noise_alpha",
    "patience": "train.early_stopping_patience",
    "early_stopping": "train.early_stopping_patience",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "scale": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "target_layers": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "rslora": "lora.use_rslora",
    "dora": "lora.use_dora",
    "base_model": "model.base",
    "model_name": "model.base",
    "model_id": "model.base",
    "model_name_or_path": "model.base",
    "model_path": "model.base",
    "quant_type": "quantization.bnb_4bit_quant_type",
    "double_quant": "quantization.bnb_4bit_use_double_quant",
    "compute_dtype": "quantization.bnb_4bit_compute_dtype",
    "dataset": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "val": "data.validation",
    "valid": "data.validation",
    "eval_data": "data.validation",
    "validation_file": "data.validation",
    "out_dir": "output_dir",
    "output": "output_dir",
}

VALUES: dict[tuple[str, str], str] = {  # field of SFTConfig, value elsewhere -> value here
    ("optim", "adam"): "adamw_torch",
    ("optim", "adamw"): "adamw_torch",
}


def meant_by(name: str, *, section: str) -> str | None:
    """What to do about the unknown key ``name`` of a section (empty: the top level); None for no synonym."""
    key = KEYS.get(name.lower().replace("-", "_"))
    if key is None:
        return None
    own_section, _, own_name = key.rpartition(".")
    return f"did you mean {own_name!r}?" if own_section == section else f"did you mean {key!r}? Write it there"


def value_meant_by(value: str, *, field: str) -> str | None:
    """What to do about the unknown ``value`` of a field; None for no synonym."""
    meant = VALUES.get((field, value.lower().replace("-", "_")))
    return None if meant is None else f"did you mean {meant!r}?"
