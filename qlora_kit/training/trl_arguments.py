"""TRL's ``SFTConfig`` of a run, from the ``train`` section."""

from __future__ import annotations

import torch
from trl import SFTConfig

from qlora_kit.config import RunConfig
from qlora_kit.errors import ConfigError
from qlora_kit.models import compute_dtype


def sft_config(config: RunConfig, device: torch.device) -> SFTConfig:
    """TRL's configuration: the user's fields, and those that the kit decides.

    Raises:
        ConfigError: TRL or transformers refuses the fields together.
    """
    dtype = compute_dtype(config.quantization.bnb_4bit_compute_dtype, device)
    # Every trained weight has its part in every loss; unfreezing, where that is not so, is for one process only.
    arguments = {"ddp_find_unused_parameters": False} | config.sft_arguments()
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
        settings = SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train: {error}",
            expected="values that TRL's SFTConfig accepts together",
            fix="correct the train section; the fields are documented with SFTConfig and TrainingArguments",
        ) from error
    settings._n_gpu = min(settings.n_gpu, 1)  # of several, one process takes one; with more, TRL refuses to begin
    return settings
