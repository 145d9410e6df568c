"""Where else metrics go (``train.report_to``): checked before anything costly, and kept inside the run folder.

transformers' own callbacks do the logging. TensorBoard's files lie in ``RUN/runs`` by themselves; Weights & Biases
writes below the current folder unless it is told where, and its run is ended here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qlora_kit.errors import ConfigError
from qlora_kit.suggest import advice

EXTRAS = ("tensorboard", "wandb")
"""What the kit has an extra for and tests; any other of transformers' integrations may be named too."""
NOWHERE = "none"
LOG_FOLDER = "runs"
WANDB_PROJECT = "qlora-kit"
_NEVER_LISTED = ("azure_ml", "flyte")  # transformers' list of what is installed does not say it of these


def require_reporters(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist, or whose library is not installed.

    Raises:
        ConfigError: With the line that installs what is missing.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if tuple(names) in ((), (NOWHERE,)):
        return
    installed = {*get_available_reporting_integrations(), *_NEVER_LISTED}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to names {name!r}" + (" beside others" if name == NOWHERE else ""),
                expected=f"none alone, or some of {', '.join(INTEGRATION_TO_CALLBACK)}",
                fix="leave none out" if name == NOWHERE else advice(name, INTEGRATION_TO_CALLBACK),
            )
        if name not in installed:  # a half-made callback of some of them complains once more when it is deleted
            raise _unusable(name)
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError, ValueError) as error:  # transformers' ways to say that something is missing
            raise _unusable(name, f": {error}") from error


def _unusable(name: str, reason: str = "") -> ConfigError:
    install = f"pip install 'qlora-kit[{name}]'" if name in EXTRAS else f"install the library of {name}"
    return ConfigError(
        f"train.report_to is {name}, whose library cannot be used{reason}",
        expected=f"the library of {name}, installed",
        fix=f"{install}; or set train.report_to=none",
    )


@contextmanager
def reporting(names: Sequence[str], folder: Path, *, name: str) -> Iterator[None]:
    """Inside the block, Weights & Biases, where it is asked for, logs one run into ``folder/runs``.

    Args:
        names: ``train.report_to``.
        folder: The run folder.
        name: Of the run; its project is ``$WANDB_PROJECT``, else qlora-kit.

    Raises:
        ConfigError: Weights & Biases refuses to begin, such as without a login.
    """
    if "wandb" not in names:
        yield
        return
    import wandb

    place = folder / LOG_FOLDER
    place.mkdir(exist_ok=True)  # wandb would go to a temporary folder
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT), name=name, dir=str(place))
    except wandb.errors.Error as error:
        raise ConfigError(
            f"train.report_to is wandb, which does not begin: {error}",
            expected="a login, and a connection",
            fix="run `wandb login`; or set WANDB_MODE=offline and upload later with `wandb sync`",
        ) from error
    with run:
        yield
