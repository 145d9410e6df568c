"""Decides how a run is resumed: what it began with, what may have changed, and the checkpoint that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from qlora_kit.config import RunConfig
from qlora_kit.training.checkpoints import Resumption, newest_sound
from qlora_kit.training.run_folder import clean_run_folder, run_folder_lock
from qlora_kit.training.settings import Start, resumed_start

logger = logging.getLogger(__name__)


def resume_run(
    config: RunConfig, folder: Path, now: Start, *, allow_changed: Sequence[str]
) -> tuple[Start, Resumption]:
    """What a resumed run goes on with, and from where; what was removed, refused or allowed is logged.

    Args:
        config: The configuration at hand.
        folder: The run folder; what a killed run left half written there is removed.
        now: What a run of ``config`` would begin with.
        allow_changed: Keys that may differ.

    Raises:
        ConfigError: Something differs that was not allowed.
        OutputError: No checkpoint verifies, or another process is training in the folder.
    """
    with run_folder_lock(folder):
        clean_run_folder(folder)
    began = Start.read(folder)
    resumption = newest_sound(folder, settings_sha256=began.began_sha256, with_best=config.train.load_best_model_at_end)
    for refused in resumption.refused:
        logger.warning("--resume: refused %s", refused)
    return resumed_start(began, now, allowed=allow_changed, checkpoint=resumption.checkpoint), resumption
