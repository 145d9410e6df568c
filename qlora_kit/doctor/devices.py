"""Checks of what computes: torch's build, each GPU and its driver, the compute dtype, bitsandbytes on each device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.doctor.checks import ENVIRONMENT, Check

LITTLE_FREE_SHARE = 0.5
# NF4's widest gap is between -1 and -0.6962 of the largest weight of a block: a weight is off by half of it at most.
# Double quantization moves the scale by some thousandths more.
ROUND_TRIP_LIMIT = 0.16
PROBE_SIZE = 64
_GIB = 2**30
_NO_GPU = "no GPU that torch can use: training runs on the CPU"
_SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_SMI_SECONDS = 20
_GET_TORCH = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it: its index, name, memory, and compute capability as (major, minor)."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class TorchFacts:
    """What torch says about itself.

    Attributes:
        version: Of torch.
        cuda: The CUDA version it was built for, or None.
        hip: The ROCm version it was built for, or None.
        threads: How many threads it computes with on the CPU.
        gpus: What it can use.
        problem: Why its GPUs cannot be asked, or None.
    """

    version: str
    cuda: str | None
    hip: str | None
    threads: int
    gpus: tuple[Gpu, ...]
    problem: str | None = None

    @property
    def build(self) -> str:
        """``CPU build``, ``CUDA 13.0`` or ``ROCm 7.1``."""
        if self.cuda is not None:
            return f"CUDA {self.cuda}"
        return "CPU build" if self.hip is None else f"ROCm {self.hip}"


def read_torch() -> TorchFacts | str:
    """What torch says about itself, or why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    problem = None
    gpus: list[Gpu] = []
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            gpus.append(Gpu(index, properties.name, total_bytes, free_bytes, (properties.major, properties.minor)))
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        threads=torch.get_num_threads(),
        gpus=tuple(gpus),
        problem=problem,
    )


def nvidia_driver(report: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the NVIDIA driver at hand, whatever torch can do with it; None where there is none."""
    if report.is_file():
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", report.read_text(encoding="utf-8", errors="replace"))
        return "of unknown version" if match is None else match.group(1)
    if shutil.which(_SMI[0]) is None:
        return None
    try:
        answer = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def check_torch(facts: TorchFacts | str, driver: str | None, *, hidden: str | None = None) -> Check:
    """Whether torch can be imported, and uses the GPU if there is one.

    Args:
        facts: From ``read_torch``.
        driver: From ``nvidia_driver``.
        hidden: The value of ``CUDA_VISIBLE_DEVICES``, if it is set.
    """
    if isinstance(facts, str):
        fix = f"install torch again for this machine: {_GET_TORCH}"
        return Check("torch build", False, f"torch cannot be imported: {facts}", fix, ENVIRONMENT)
    found = facts.build if driver is None else f"{facts.build}, NVIDIA driver {driver}"
    if facts.problem is not None:
        fix = "see whether nvidia-smi works; restart the driver or the machine if it does not"
        return Check("torch build", False, f"{found}: the GPU does not answer: {facts.problem}", fix, ENVIRONMENT)
    if driver is None or facts.gpus:
        return Check("torch build", True, found)
    if facts.cuda is None and facts.hip is None:
        detail = f"a CPU build, but an NVIDIA GPU is here (driver {driver}): it is not used"
        fix = f"pip install --force-reinstall torch, from the index of a CUDA version that the driver has: {_GET_TORCH}"
        return Check("torch build", False, detail, fix)
    if hidden is not None:
        fix = "unset CUDA_VISIBLE_DEVICES, or set it to the index of a GPU"
        return Check("torch build", False, f"{found}, but CUDA_VISIBLE_DEVICES={hidden!r} leaves no GPU", fix)
    fix = f"update the driver, or install torch for an older CUDA: {_GET_TORCH}"
    return Check("torch build", False, f"{found}, but torch finds no GPU that it can use", fix)


def check_gpus(facts: TorchFacts) -> list[Check]:
    """One check for each GPU; one that says so where there is none."""
    return [_check_gpu(gpu) for gpu in facts.gpus] or [Check("GPU", None, _NO_GPU)]


def _check_gpu(gpu: Gpu) -> Check:
    major, minor = gpu.capability
    detail = (
        f"{gpu.name}, {gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB free,"
        f" compute capability {major}.{minor}"
    )
    name = f"GPU {gpu.index}"
    if gpu.free_bytes < LITTLE_FREE_SHARE * gpu.total_bytes:
        return Check(name, False, detail, "end what else uses it: nvidia-smi lists the processes")
    return Check(name, True, detail)


def check_threads(threads: int, cores: int) -> Check:
    """How many threads torch computes with on the CPU."""
    detail = f"{threads} of {cores} CPU cores"
    if threads <= cores:
        return Check("threads", True, detail)
    fix = f"set OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
    return Check("threads", False, detail, fix)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_compute_dtype(device: str, dtype: str) -> Check:
    """What ``bnb_4bit_compute_dtype: auto`` means on ``device``, and why."""
    reasons = {
        "bfloat16": "the GPU computes in it",
        "float16": "the GPU has no bfloat16; the loss is scaled against underflow",
        "float32": "on a CPU",
    }
    return Check(f"compute dtype on {device}", True, f"{dtype}: {reasons[dtype]}")


def nf4_round_trip_error(device: str) -> float:
    """Quantize and dequantize a fixed weight of 64 x 64 on ``device``: the largest error by the largest weight.

    Raises:
        ImportError, OSError, RuntimeError, AttributeError: bitsandbytes does not work there.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, PROBE_SIZE * PROBE_SIZE).flip(0)[torch.arange(PROBE_SIZE**2) * 37 % PROBE_SIZE**2]
    weight = weight.reshape(PROBE_SIZE, PROBE_SIZE).to(device)
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return float((dequantize_4bit(codes, state) - weight).abs().max() / weight.abs().max())


def check_bitsandbytes(device: str, round_trip: Callable[[str], float] = nf4_round_trip_error) -> Check:
    """Whether bitsandbytes computes on ``device``, and rightly; its error is shown as it is."""
    name = f"bitsandbytes on {device}"
    fix = "install a bitsandbytes wheel that has this device's backend; `python -m bitsandbytes` says what it finds"
    try:
        error = round_trip(device)
    except (ImportError, OSError, RuntimeError, AttributeError) as problem:
        lines = str(problem).strip().splitlines() or [""]
        return Check(name, False, f"does not work: {type(problem).__name__}: {lines[0]}", fix, ENVIRONMENT)
    detail = f"NF4 there and back: largest error {error:.3f} of the largest weight"
    if error <= ROUND_TRIP_LIMIT:
        return Check(name, True, detail)
    return Check(name, False, f"{detail}, at most {ROUND_TRIP_LIMIT} can be right", fix, ENVIRONMENT)
