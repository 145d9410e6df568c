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


def require_reporters(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist, or whose library is not installed.

    Raises:
        ConfigError: With the line that installs what is missing.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if tuple(names) in ((), (NOWHERE,)):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"train.report_to names {name!r}" + (" beside others" if name == NOWHERE else ""),
                expected=f"none alone, or some of {', '.join(INTEGRATION_TO_CALLBACK)}",
                fix="leave none out" if name == NOWHERE else advice(name, INTEGRATION_TO_CALLBACK),
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:  # transformers' way to say that the library is missing
            install = f"pip install 'qlora-kit[{name}]'" if name in EXTRAS else str(error)
            raise ConfigError(
                f"train.report_to is {name}, whose library cannot be used",
                expected=f"the library of {name}, installed",
                fix=f"{install}; or set train.report_to=none",
            ) from error


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
