"""Runs every check in order, the cheap ones first, and with ``train`` the three steps on each device."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.doctor.checks import DEVIATION, ENVIRONMENT, Check, Diagnosis
from qlora_kit.doctor.devices import (
    TorchFacts,
    check_bitsandbytes,
    check_compute_dtype,
    check_gpus,
    check_threads,
    check_torch,
    nvidia_driver,
    read_torch,
    usable_cores,
)
from qlora_kit.doctor.environment import (
    check_base,
    check_folder,
    check_hub,
    check_memory,
    check_system,
    look_at,
)
from qlora_kit.doctor.tested_versions import (
    check_extra,
    check_kit,
    check_library,
    check_python,
    installed_versions,
    read_metadata,
)
from qlora_kit.host_memory import available_memory_bytes, cgroup_free_bytes

if TYPE_CHECKING:
    from qlora_kit.doctor.comparison import Comparison
    from qlora_kit.doctor.references import Reference

_REPORT = (
    "update the driver, torch and bitsandbytes within their ranges and run it again; until it passes, adapters"
    " that are trained on this device are not what the configuration says"
)
_OFF = "set train.fast=off on this device: the libraries' own layers compute what they should"


def diagnose(*, train: bool = False, progress: Callable[[str], None] | None = None) -> Diagnosis:
    """Look at everything that the kit needs.

    Args:
        train: Also take three small QLoRA steps and a merge on each device, and compare them with the references.
        progress: Told what is being done, where it takes seconds.
    """
    tell = progress or (lambda text: None)
    checks = _version_checks()
    lacking = any(check.mark == "FAILED" for check in checks)
    checks += _machine_checks(libraries=not lacking)
    tell("importing torch and bitsandbytes")
    facts = read_torch()
    checks.append(check_torch(facts, nvidia_driver(), hidden=os.environ.get("CUDA_VISIBLE_DEVICES")))
    if isinstance(facts, TorchFacts) and not lacking:
        checks += _device_checks(facts)
    if not train:
        return Diagnosis(tuple(checks))
    if not isinstance(facts, TorchFacts) or any(check.mark == "FAILED" for check in checks):
        checks.append(Check("training", None, "not tried: first repair what FAILED above"))
        return Diagnosis(tuple(checks))
    training_checks, measurements = _training_checks(_devices(facts), tell)
    return Diagnosis((*checks, *training_checks), tuple(measurements))


def _version_checks() -> list[Check]:
    found = read_metadata()
    checks = [check_system(platform.system()), check_kit(found)]
    if found is None:
        return checks
    versions = installed_versions([*found.libraries, *(item for group in found.extras.values() for item in group)])
    checks.append(check_python(platform.python_version(), found.python))
    checks += [check_library(requirement, versions[requirement.name]) for requirement in found.libraries]
    checks += [check_extra(extra, requirements, versions) for extra, requirements in found.extras.items()]
    return checks


def _machine_checks(*, libraries: bool) -> list[Check]:
    """Memory, disk, Hub and the embedded base; the last two only where the libraries are there."""
    here = Path.cwd()
    checks = [
        check_memory(available_memory_bytes(), cgroup_free_bytes()),
        check_folder("current folder", look_at(here), fix="work in a folder of your own on a disk with room"),
    ]
    if not libraries:
        return checks
    from huggingface_hub import constants, get_token

    from qlora_kit.base_files import TINY_FOLDER
    from qlora_kit.starter import PACKAGE, PACKAGED
    from qlora_kit.tasks import TASKS

    cache = Path(constants.HF_HUB_CACHE)
    store = (PACKAGED if PACKAGED.is_dir() else PACKAGE.parent) / "adapters"
    return [
        *checks,
        check_folder("Hub cache", look_at(cache), fix="set HF_HOME to a folder on a disk with room for bases"),
        check_hub(offline=constants.HF_HUB_OFFLINE, token=get_token() is not None),
        check_base(TINY_FOLDER, [store / task for task in TASKS]),
    ]


def _devices(facts: TorchFacts) -> list[str]:
    return [*(f"cuda:{gpu.index}" for gpu in facts.gpus), "cpu"]


def _device_checks(facts: TorchFacts) -> list[Check]:
    import torch

    from qlora_kit.doctor.training import compute_dtype_name

    checks = [*check_gpus(facts), check_threads(facts.threads, usable_cores())]
    for device in _devices(facts):
        checks.append(check_compute_dtype(device, compute_dtype_name("auto", torch.device(device))))
        checks.append(check_bitsandbytes(device))
    return checks


def _training_checks(devices: list[str], tell: Callable[[str], None]) -> tuple[list[Check], list[dict[str, Any]]]:
    """Three steps and a merge on each device, in the dtype that it would use; on a GPU in fp32 as well.

    Where they are what they should be, the steps are taken by the fused path too.
    """
    import torch

    from qlora_kit.doctor.references import load_reference
    from qlora_kit.doctor.subject import inputs_sha256
    from qlora_kit.doctor.training import compute_dtype_name

    reference = load_reference()
    if reference.inputs_sha256 != inputs_sha256():
        detail = "this machine makes other inputs than the references were computed from"
        return [Check("inputs of --train", False, detail, "install the kit and numpy again", DEVIATION)], []
    checks: list[Check] = []
    measurements: list[dict[str, Any]] = []
    for name in devices:
        device = torch.device(name)
        for dtype in dict.fromkeys((compute_dtype_name("auto", device), "float32")):
            tell(f"three steps and a merge on {name} in {dtype}")
            for fused in (False, True):
                found, measurement = train_on(device, dtype, reference, fused=fused)
                checks += found
                measurements += [] if measurement is None else [measurement]
                if not all(check.ok for check in found):
                    break
    return checks, measurements


def train_on(
    device: Any, dtype: str, reference: Reference, *, fused: bool = False
) -> tuple[list[Check], dict[str, Any] | None]:
    """Measure one device (a ``torch.device``) in one compute dtype, and compare; with the numbers for JSON.

    By the fused path, what does not come from it is not compared again.
    """
    from qlora_kit.doctor.comparison import TRAINED, compare
    from qlora_kit.doctor.training import measure
    from qlora_kit.errors import QloraKitError

    place = f"{device} {dtype}{' fused' if fused else ''}"
    try:
        measured = measure(device, dtype=dtype, fused=fused)
    except (QloraKitError, RuntimeError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        fix = "look for the message above in the notes of torch or bitsandbytes for this GPU"
        return [Check(f"{place}: training", False, text.splitlines()[0], _OFF if fused else fix, ENVIRONMENT)], None
    comparisons = [comparison for comparison in compare(measured, reference) if not fused or comparison.name in TRAINED]
    measurement = {
        "device": measured.device,
        "fused": fused,
        "compute_dtype": measured.compute_dtype,
        "seconds": measured.seconds,
        "losses": list(measured.losses),
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    return [_as_check(place, comparison, _OFF if fused else _REPORT) for comparison in comparisons], measurement


def _as_check(place: str, comparison: Comparison, fix: str) -> Check:
    name = f"{place}: {comparison.name}"
    if comparison.ok:
        return Check(name, True, comparison.detail)
    return Check(name, False, comparison.detail, fix, DEVIATION)
