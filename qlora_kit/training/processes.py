"""Several processes of one run: what the main one does for all or before the others, and a fault that ends them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.launched import is_main_process, process_count, sharding

T = TypeVar("T")
E = TypeVar("E", bound=QloraKitError)


def join_processes(device: torch.device) -> None:
    """Let this process meet the others of its run, if it has any: on GPUs by NCCL, on CPUs by gloo.

    Raises:
        ConfigError: The launcher asks to split the model over them.
    """
    way = sharding()
    if way is not None:
        error = ConfigError(
            f"accelerate launch is set to {way}, which splits the model over the processes",
            expected="plain processes: the kit splits the frozen base itself, and the adapter stays whole",
            fix="start with accelerate launch --config_file configs/accelerate/ddp.yaml, with train.shard_base=true to "
            "split the base",
        )
        raise raised_in_all(error)
    if process_count() > 1:
        PartialState(cpu=device.type == "cpu")


def from_main(action: Callable[[], T]) -> T:
    """What ``action`` gives in the main process, in every process; it must be picklable, and is run there alone.

    Raises:
        QloraKitError: ``action`` raised it; the others raise a copy that the command line does not print again.
    """
    if process_count() == 1:
        return action()
    state = PartialState()
    state.wait_for_everyone()  # the main one must not change what another is still reading
    sent: list[object] = [None, None]
    fault: QloraKitError | None = None
    if state.is_main_process:
        try:
            sent[0] = action()
        except QloraKitError as error:
            fault = error
            sent[1] = (type(error), error.faults, error.exit_code)
    result, told = broadcast_object_list(sent)
    if fault is not None:
        raise fault
    if told is not None:
        kind, faults, exit_code = told
        copy: QloraKitError = kind.of(faults)
        copy.exit_code, copy.told = exit_code, True
        raise copy
    return result


def main_first(action: Callable[[], T]) -> T:
    """What ``action`` gives in each process; the others begin when the main one is done, and find what it left.

    Raises:
        QloraKitError: ``action`` raised it in the main process, or here.
    """
    if process_count() == 1:
        return action()
    mine: list[T] = []
    from_main(lambda: mine.append(action()))
    return mine[0] if mine else action()


def raised_in_all(error: E) -> E:
    """The same error, which every process raises at once: only the main one's is printed."""
    error.told = not is_main_process()
    return error


def in_any_process(fact: bool, device: torch.device) -> bool:
    """Whether it holds in one of the processes at least; each must ask."""
    if process_count() == 1:
        return fact
    return bool(reduce(torch.tensor(float(fact), device=device), reduction="sum") > 0)


def gathered(names: list[str]) -> list[str]:
    """The lists of all processes as one; each must call it."""
    return names if process_count() == 1 else list(gather_object(names))
