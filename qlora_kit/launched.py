"""What `accelerate launch` or `torchrun` tells this process of its place among those of one run, by its environment."""

from __future__ import annotations

import os

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def sharding() -> str | None:
    """The way in which the launcher asks that the model be split over the processes; None for whole copies."""
    return next((name for key, name in _SHARDING.items() if os.environ.get(key, "false").lower() == "true"), None)


def process_index() -> int:
    """The number of this process in the run; 0 is the main one, which alone writes and prints."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index_on_this_machine() -> int | None:
    """The number of this process among those of this machine, which is that of its GPU; None without a launcher."""
    local = os.environ.get("LOCAL_RANK")
    return None if local is None else int(local)


def count_on_this_machine() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return process_index() == 0
