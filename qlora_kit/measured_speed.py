"""How fast training was on this machine: each run notes its tokens per second, the next one's estimate reads it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from qlora_kit.atomic import atomic_file
from qlora_kit.data.token_cache import cache_folder
from qlora_kit.errors import QloraKitError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SPEED_FILE = "training_speed.json"


def note_speed(base: str, device: torch.device, tokens_per_second: float) -> None:
    """Keep the speed of a run that has ended; where the cache cannot be written, none is kept."""
    if tokens_per_second <= 0:  # a resumed run that had nothing left to do
        return
    path = cache_folder() / SPEED_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({**_read(), _key(base, device): tokens_per_second}), encoding="utf-8")
    except (OSError, QloraKitError) as error:
        logger.info("the speed of this run cannot be kept: %s", error)


def last_speed(base: str, device: torch.device) -> float | None:
    """Tokens per second of the last run on this base and device; None before the first."""
    speed = _read().get(_key(base, device))
    return speed if isinstance(speed, float) and speed > 0 else None


def _read() -> dict[str, Any]:
    try:
        content = json.loads((cache_folder() / SPEED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(base: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"{base} on {device.type}"
    import torch

    return f"{base} on {torch.cuda.get_device_name(device)}"
