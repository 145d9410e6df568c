"""`qlora-kit doctor`: each check tells right from wrong, and `--train` names whatever is computed wrongly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_kit.cli import main
from qlora_kit.doctor import Check, Diagnosis, diagnose, subject, tested_versions
from qlora_kit.doctor.checks import DEVIATION, ENVIRONMENT
from qlora_kit.doctor.comparison import TOLERANCES, compare, round_to_bf16
from qlora_kit.doctor.devices import (
    Gpu,
    TorchFacts,
    check_bitsandbytes,
    check_compute_dtype,
    check_gpus,
    check_threads,
    check_torch,
    nvidia_driver,
    read_torch,
)
from qlora_kit.doctor.environment import (
    Folder,
    check_base,
    check_folder,
    check_hub,
    check_memory,
    check_system,
    look_at,
)
from qlora_kit.doctor.references import Reference, load_reference, save_reference
from qlora_kit.doctor.tested_versions import Metadata, check_extra, check_kit, check_library, check_python
from qlora_kit.doctor.training import Measured, measure
from qlora_kit.host_memory import available_memory_bytes, cgroup_free_bytes

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
Q_PROJ = "model.layers.0.self_attn.q_proj"
CPU_TORCH = TorchFacts("2.13.0+cpu", cuda=None, hip=None, threads=2, gpus=())
CUDA_TORCH = TorchFacts("2.13.0", cuda="13.0", hip=None, threads=8, gpus=())
GPU = Gpu(0, "NVIDIA GeForce RTX 4090", total_bytes=24 * GIB, free_bytes=23 * GIB, capability=(8, 9))


def failed(check: Check, *parts: str, exit_code: int = ENVIRONMENT) -> None:
    """It is a fault with this exit code (0: a warning), a way on, and each of ``parts`` in what it says."""
    assert check.ok is False
    assert check.exit_code == exit_code
    assert check.fix
    for part in parts:
        assert part in f"{check.detail}\n{check.fix}"


# --- versions, from the package's metadata ---


@pytest.mark.parametrize(
    ("found", "exit_code", "part"),
    [
        (None, ENVIRONMENT, "missing"),
        ("5.16.2", ENVIRONMENT, "5.16.2, the kit needs >=5.17,<6"),
        ("6.0.0", 0, "6.0.0 is newer than what was tested (>=5.17,<6)"),
        ("5.23.0", None, "5.23.0 (>=5.17,<6)"),
        ("5.23.0+local", None, "5.23.0+local"),
    ],
)
def test_a_library_is_compared_with_its_range(found: str | None, exit_code: int | None, part: str) -> None:
    check = check_library(Requirement("transformers<6,>=5.17"), found)
    if exit_code is None:
        assert check.ok is True
        assert part in check.detail
    else:
        failed(check, part, 'pip install "transformers>=5.17,<6"', exit_code=exit_code)


def test_a_library_without_a_range_is_only_missing() -> None:
    assert check_library(Requirement("anything"), "0.1").ok is True
    failed(check_library(Requirement("anything"), None), "any version", 'pip install "anything"')


def test_python_and_system() -> None:
    assert check_python("3.11.7", SpecifierSet(">=3.11")).ok is True
    failed(check_python("3.10.1", SpecifierSet(">=3.11")), "3.10.1, the kit needs >=3.11")
    assert check_system("Linux").ok is True
    failed(check_system("Windows"), "WSL")


def test_an_extra_is_installed_or_its_line_is_told() -> None:
    requirements = [Requirement("fastapi>=0.100"), Requirement("uvicorn")]
    assert check_extra("serve", requirements, {"fastapi": "0.120", "uvicorn": "1"}).ok is True
    for found in ({"fastapi": None, "uvicorn": "1"}, {"fastapi": "0.99", "uvicorn": "1"}):
        check = check_extra("serve", requirements, found)
        assert check.ok is None
        assert check.detail == 'not installed (fastapi): pip install "qlora-kit[serve]"'


def test_metadata_are_read_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against pyproject.toml's own rules: markers decide what is required, what is an extra, what is neither."""
    lines = ["torch<3,>=2", 'winonly; sys_platform == "win32"', 'gguf>=0.19; extra == "gguf"', 'pytest; extra == "dev"']
    content: dict[str, Any] = {"Version": "9.9", "Requires-Python": ">=3.11"}

    class Content(dict[str, Any]):
        def get_all(self, name: str) -> list[str]:
            return {"Provides-Extra": ["dev", "gguf"]}[name]

    monkeypatch.setattr(tested_versions, "metadata", lambda name: Content(content))
    monkeypatch.setattr(tested_versions, "requires", lambda name: lines)
    found = tested_versions.read_metadata()
    assert found is not None
    assert (found.version, str(found.python)) == ("9.9", ">=3.11")
    assert [item.name for item in found.libraries] == ["torch"]
    assert {extra: [item.name for item in group] for extra, group in found.extras.items()} == {
        "dev": ["pytest"],
        "gguf": ["gguf"],
    }


def test_a_kit_without_metadata_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tested_versions, "metadata", missing)
    assert tested_versions.read_metadata() is None
    failed(check_kit(None), "without being installed", exit_code=0)


# --- torch, GPUs, bitsandbytes ---


def test_torch_that_cannot_be_imported() -> None:
    failed(check_torch("OSError: libcudart.so.13", None), "libcudart.so.13", "pytorch.org")


def test_a_gpu_that_a_cpu_build_leaves_unused() -> None:
    assert check_torch(CPU_TORCH, None).ok is True
    failed(check_torch(CPU_TORCH, "580.65"), "CPU build", "580.65", "install --force-reinstall torch", exit_code=0)


def test_a_gpu_that_a_cuda_build_cannot_use() -> None:
    failed(check_torch(CUDA_TORCH, "470.1"), "CUDA 13.0", "update the driver", exit_code=0)
    failed(check_torch(CUDA_TORCH, "580.65", hidden=""), "CUDA_VISIBLE_DEVICES=''", exit_code=0)
    failed(check_torch(replace(CUDA_TORCH, problem="CUDA error: unknown"), "580.65"), "CUDA error", "nvidia-smi")
    with_gpu = replace(CUDA_TORCH, gpus=(GPU,))
    assert check_torch(with_gpu, "580.65").detail == "CUDA 13.0, NVIDIA driver 580.65"
    assert check_torch(replace(CPU_TORCH, hip="7.1", gpus=(GPU,)), None).detail == "ROCm 7.1"


def test_gpus_are_described_and_taken_ones_are_told() -> None:
    (none,) = check_gpus(CPU_TORCH)
    assert none.ok is None
    taken = replace(GPU, index=1, free_bytes=3 * GIB)
    free, full = check_gpus(replace(CUDA_TORCH, gpus=(GPU, taken)))
    assert (free.name, free.ok) == ("GPU 0", True)
    assert free.detail == "NVIDIA GeForce RTX 4090, 23.0 of 24.0 GiB free, compute capability 8.9"
    failed(full, "3.0 of 24.0 GiB", "nvidia-smi", exit_code=0)


def test_torch_describes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = read_torch()
    assert isinstance(facts, TorchFacts)
    assert (facts.version, facts.cuda, facts.threads) == (
        torch.__version__,
        torch.version.cuda,
        torch.get_num_threads(),
    )

    def broken() -> int:
        raise RuntimeError("CUDA error: device not ready\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    found = read_torch()
    assert isinstance(found, TorchFacts)
    assert found.problem == "CUDA error: device not ready"


def test_the_driver_is_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "version"
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:59:04 UTC 2025\nGCC version: 12\n"
    report.write_text(text)
    assert nvidia_driver(report) == "580.65.06"
    open_module = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    report.write_text(open_module)
    assert nvidia_driver(report) == "570.86.15"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_driver(tmp_path / "none") is None
    tool = tmp_path / "nvidia-smi"
    for body, found in (("echo 550.54", "550.54"), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
        assert nvidia_driver(tmp_path / "none") == found


def test_bitsandbytes_is_tried() -> None:
    check = check_bitsandbytes("cpu")
    assert check.ok is True
    assert float(re.findall(r"error (\S+) of", check.detail)[0]) == pytest.approx((1 - 0.6961928) / 2, abs=0.005)

    def refuses(device: str) -> float:
        raise RuntimeError("no kernel image is available\nsecond line")

    failed(check_bitsandbytes("cuda:0", refuses), "RuntimeError: no kernel image is available", "bitsandbytes wheel")
    failed(check_bitsandbytes("cuda:0", lambda device: 0.5), "0.500")
    failed(check_bitsandbytes("cuda:0", lambda device: float("nan")), "nan")


def test_compute_dtype_and_threads() -> None:
    assert check_compute_dtype("cpu", "float32").detail.startswith("float32")
    assert "no bfloat16" in check_compute_dtype("cuda:0", "float16").detail
    assert check_threads(2, 2).ok is True
    failed(check_threads(16, 2), "16 of 2", "OMP_NUM_THREADS=2", exit_code=0)


# --- memory, disk, Hub, base ---


def test_memory_and_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32000000 kB\nMemAvailable:   16777216 kB\n")
    assert available_memory_bytes(meminfo) == 16 * GIB
    assert available_memory_bytes(tmp_path / "none") is None
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    outer, inner = tmp_path / "fs" / "user", tmp_path / "fs" / "user" / "job"
    inner.mkdir(parents=True)
    assert cgroup_free_bytes(membership, tmp_path / "fs") is None
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (outer / "memory.max").write_text(f"{8 * GIB}\n")
    (outer / "memory.current").write_text(f"{5 * GIB}\n")
    assert cgroup_free_bytes(membership, tmp_path / "fs") == 3 * GIB
    old = tmp_path / "fs" / "memory" / "job"
    old.mkdir(parents=True)
    membership.write_text("5:cpu,memory:/job\n")
    for limit, free in ((2**63 - 4096, None), (2 * GIB, 1 * GIB)):
        (old / "memory.limit_in_bytes").write_text(str(limit))
        (old / "memory.usage_in_bytes").write_text(str(1 * GIB))
        assert cgroup_free_bytes(membership, tmp_path / "fs") == free
    assert check_memory(16 * GIB, None).detail == "16.0 GiB free"
    assert "the machine has 16.0 GiB" in check_memory(16 * GIB, 6 * GIB).detail
    failed(check_memory(16 * GIB, 1 * GIB), "1.0 GiB free", "container", exit_code=0)
    assert check_memory(None, None).ok is None


def test_a_folder_needs_room_and_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "not" / "there"
    assert look_at(path).writable is True
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    assert look_at(path).writable is False
    fix = "set HF_HOME"
    assert check_folder("Hub cache", Folder(path, 9 * GIB, True), fix=fix).ok is True
    failed(check_folder("Hub cache", Folder(path, 9 * GIB, False), fix=fix), "cannot be written", fix, exit_code=0)
    failed(check_folder("Hub cache", Folder(path, GIB // 2, True), fix=fix), "0.5 GiB free", fix, exit_code=0)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(diagnose().to_json())
    assert "token present" in text
    assert "hf_secret" not in text
    assert check_hub(offline=True, token=False).detail == "offline: only bases that are in the cache; token absent"


def test_a_damaged_embedded_base_is_told(random_base: Path, tmp_path: Path) -> None:
    from qlora_kit.base_files import TINY_FOLDER

    store = [ROOT / "adapters" / "sentiment", tmp_path / "none"]
    whole = check_base(TINY_FOLDER, store)
    assert whole.ok is True
    assert "adapters were trained on" in whole.detail
    assert "headers agree" in check_base(TINY_FOLDER, []).detail
    failed(check_base(random_base, store), "not those that the shipped adapters were trained on")
    failed(check_base(tmp_path, store), "config.json")
    (tmp_path / "config.json").write_text((TINY_FOLDER / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((TINY_FOLDER / "model.safetensors").read_bytes()[:4000])
    failed(check_base(tmp_path, store), "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((random_base / "model.safetensors").read_bytes())
    failed(check_base(tmp_path, store), "model.")


# --- the whole command ---


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs `qlora-kit doctor ARGUMENTS` 80 columns wide: exit code and stdout."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["doctor", *arguments])
        return int(end.value.code or 0), capsys.readouterr().out

    return run


def by_name(output: str) -> Mapping[str, Mapping[str, Any]]:
    return {check["name"]: check for check in json.loads(output)["checks"]}


def test_json_has_every_check(doctor: Callable[..., tuple[int, str]]) -> None:
    code, output = doctor("--json")
    assert code == 0, output
    (line,) = output.splitlines()
    content = json.loads(line)
    assert all(set(check) >= {"name", "ok", "detail", "fix"} for check in content["checks"])
    names = [check["name"] for check in content["checks"]]
    assert len(names) == len(set(names))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    libraries = {Requirement(line).name for line in declared["dependencies"]} - {"packaging"}
    others = {"Python", "torch build", "memory", "Hub cache", "embedded base", "bitsandbytes on cpu"}
    assert set(names) >= libraries | others | {f"extra {extra}" for extra in declared["optional-dependencies"]}
    assert content["training"] == []


def test_the_table_fits_80_columns(
    doctor: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = doctor()
    assert code == 0
    *table, _, summary = output.splitlines()
    assert max(map(len, table)) <= 80
    assert summary.startswith("everything needed is here")


def test_what_is_missing_ends_with_2(doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Metadata("1", SpecifierSet(">=3.11"), (Requirement("no-such-library>=3"),), {})
    monkeypatch.setattr("qlora_kit.doctor.diagnosis.read_metadata", lambda: found)
    code, output = doctor("--train")
    assert code == 2
    assert "FAILED  no-such-library" in output
    assert 'do: pip install "no-such-library>=3"' in output
    assert "not tried: first repair what FAILED above" in output
    assert output.splitlines()[-1].startswith("1 problem: no-such-library")


def test_it_works_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    """And imports none of the heavy libraries on the way."""
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom qlora_kit.cli import main\n"
        "try:\n    main(['doctor', '--json'])\nexcept SystemExit as end:\n    print(end.code)\n"
        "print(*sorted({'transformers', 'peft', 'trl', 'bitsandbytes', 'datasets'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    content, code, heavy = process.stdout.splitlines()
    assert (code, heavy) == ("2", "")
    assert by_name(content)["torch build"]["ok"] is False
    assert "embedded base" in by_name(content)


def test_exit_code_and_summary() -> None:
    good, warning = Check("a", True, ""), Check("b", False, "", "do")
    environment, deviation = Check("c", False, "", "do", ENVIRONMENT), Check("d", False, "", "do", DEVIATION)
    unknown = Check("e", None, "", None, ENVIRONMENT)
    assert [check.mark for check in (good, warning, environment, unknown)] == ["ok", "warning", "FAILED", "-"]
    for checks, code in (
        ([good, unknown], 0),
        ([warning], 0),
        ([good, deviation], 3),
        ([deviation, environment], 2),
    ):
        assert Diagnosis(tuple(checks)).exit_code == code
    assert Diagnosis((good,)).summary == "everything needed is here"
    assert Diagnosis((warning,)).summary == "everything needed is here; 1 warning: b"
    assert Diagnosis((environment, deviation, warning)).summary == "2 problems: c, d; 1 warning: b"


# --- --train ---


@pytest.fixture(scope="module")
def reference() -> Reference:
    """What the package ships."""
    return load_reference()


@pytest.fixture(scope="module")
def measured() -> Measured:
    """What this CPU computes."""
    return measure(torch.device("cpu"))


def deviations(measured: Measured, reference: Reference) -> dict[str, str]:
    """Name of each comparison that failed, and what it says."""
    return {found.name: found.detail for found in compare(measured, reference) if not found.ok}


def changed(tensors: Mapping[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {**tensors, name: change(tensors[name].copy())}


def test_train_passes_on_this_cpu(doctor: Callable[..., tuple[int, str]]) -> None:
    code, output = doctor("--train", "--json")
    assert code == 0, output
    names = {name for name in by_name(output) if name.startswith("cpu float32: ")}
    kinds = {"NF4 codes", "NF4 scales", "loss", "gradients", "three steps", "merged weights", "unmerged rest"}
    assert {name.removeprefix("cpu float32: ") for name in names} == kinds
    assert [name for name in by_name(output) if name.startswith("cpu float32 fused: ")] == [
        f"cpu float32 fused: {kind}" for kind in ("loss", "gradients", "three steps")
    ]
    plain, fused = json.loads(output)["training"]
    for training in (plain, fused):
        assert (training["device"], training["compute_dtype"], len(training["losses"])) == ("cpu", "float32", 3)
    assert (plain["fused"], fused["fused"]) == (False, True)


def test_a_wrong_fused_path_is_told_apart(
    doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.fast.norm.inverse_rms", lambda x, eps: x[..., :1] * 0 + 1)
    monkeypatch.setattr("qlora_kit.fast.linear_group.inverse_rms", lambda x, eps: x[..., :1] * 0 + 1)
    code, output = doctor("--train", "--json")
    assert code == 3
    wrong = {name: check for name, check in by_name(output).items() if check["ok"] is False}
    assert {*wrong} == {f"cpu float32 fused: {kind}" for kind in ("loss", "gradients", "three steps")}
    assert all("train.fast=off" in check["fix"] for check in wrong.values())


def test_a_fused_path_that_does_not_take_the_subject_is_told(
    doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.fast.install.FAMILIES", {"llama": "Llama"})
    code, output = doctor("--train", "--json")
    assert code == 2
    told = by_name(output)["cpu float32 fused: training"]
    assert "mlp (the architecture Qwen2ForCausalLM is not one of Llama)" in told["detail"]


def test_a_wrong_merge_ends_with_3(doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.merging.tensors.lora_delta", lambda a, b, scaling: b @ a)
    code, output = doctor("--train", "--json")
    assert code == 3
    wrong = [name for name, check in by_name(output).items() if check["ok"] is False]
    assert wrong == ["cpu float32: merged weights"]
    assert by_name(output)[wrong[0]]["fix"]


def test_a_wrong_learning_rate_is_named(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LEARNING_RATE", subject.LEARNING_RATE * 1.01)
    found = deviations(measure(torch.device("cpu")), reference)
    assert found.keys() >= {"three steps"}
    assert not found.keys() & {"NF4 codes", "NF4 scales", "gradients", "merged weights", "unmerged rest"}


def test_a_wrong_scaling_is_named(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LORA_ALPHA", 9)
    assert deviations(measure(torch.device("cpu")), reference).keys() >= {"loss", "gradients", "three steps"}


def test_one_wrong_value_of_each_kind_is_named(measured: Measured, reference: Reference) -> None:
    def flip(codes: Any) -> Any:
        codes[3, 5] ^= 1
        return codes

    def move(weight: Any) -> Any:
        weight[3, 5] += 0.01
        return weight

    gradient = f"{Q_PROJ}.lora_A"
    scale = f"{Q_PROJ}"
    wrong: dict[str, Measured] = {
        "NF4 codes": replace(measured, codes=changed(measured.codes, Q_PROJ, flip)),
        "NF4 scales": replace(measured, scales=changed(measured.scales, scale, lambda scales: scales * 1.00001)),
        "loss": replace(measured, losses=(*measured.losses[:2], measured.losses[2] * 1.001)),
        "gradients": replace(measured, gradients=changed(measured.gradients, gradient, lambda tensor: tensor * 1.001)),
        "merged weights": replace(measured, merged=changed(measured.merged, f"{Q_PROJ}.weight", move)),
        "unmerged rest": replace(measured, merged=changed(measured.merged, "model.norm.weight", lambda w: w * 2)),
    }
    assert deviations(measured, reference) == {}
    for name, measurement in wrong.items():
        assert list(deviations(measurement, reference)) == [name]
    assert deviations(wrong["NF4 codes"], reference)["NF4 codes"].endswith(
        f"147,455 of 147,456 equal; most differ in {Q_PROJ}"
    )
    assert gradient in deviations(wrong["gradients"], reference)["gradients"]


@pytest.mark.parametrize("kind", ["scales", "gradients", "adapter", "merged"])
def test_a_value_that_is_no_number_fails(kind: str, measured: Measured, reference: Reference) -> None:
    tensors = vars(measured)[kind]
    name = next(iter(tensors))
    broken = replace(measured, **{kind: changed(tensors, name, lambda tensor: tensor * np.nan)})
    assert deviations(broken, reference)
    assert deviations(replace(measured, losses=(np.nan, *measured.losses[1:])), reference).keys() == {"loss"}


def test_missing_and_misshapen_tensors_are_named(measured: Measured, reference: Reference) -> None:
    name = f"{Q_PROJ}.lora_A"
    for gradients in (
        {key: value for key, value in measured.gradients.items() if key != name},
        changed(measured.gradients, name, lambda tensor: tensor[:2]),
    ):
        assert name in deviations(replace(measured, gradients=gradients), reference)["tensors"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_compute_dtypes_stay_within_their_tolerance(dtype: str, fused: bool, reference: Reference) -> None:
    """The CPU's twin of what a GPU computes in; and it is really coarser than fp32."""
    measured = measure(torch.device("cpu"), dtype=dtype, fused=fused)
    assert measured.compute_dtype == dtype
    assert deviations(measured, reference) == {}
    errors = {found.name: found.value for found in compare(measured, reference)}
    assert TOLERANCES["float32"].tensor < errors["gradients"] < TOLERANCES[dtype].tensor


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_gpu_passes(dtype: str, fused: bool, reference: Reference) -> None:
    assert deviations(measure(torch.device("cuda:0"), dtype=dtype, fused=fused), reference) == {}


def test_a_device_that_fails_ends_with_2_and_its_message(
    doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(device: torch.device, *, dtype: str, fused: bool) -> Measured:
        raise RuntimeError("CUDA error: no kernel image\nmore")

    monkeypatch.setattr("qlora_kit.doctor.training.measure", fails)
    code, output = doctor("--train", "--json")
    assert code == 2
    assert by_name(output)["cpu float32: training"]["detail"] == "CUDA error: no kernel image"


def test_other_inputs_than_the_references_are_refused(
    doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "ADAM_EPSILON", 0.02)
    code, output = doctor("--train", "--json")
    assert code == 3
    assert by_name(output)["inputs of --train"]["ok"] is False


# --- references and subject ---


def test_the_shipped_references_are_what_the_script_computes(reference: Reference) -> None:
    from scripts.build_doctor_references import compute

    again = compute()
    assert again.inputs_sha256 == reference.inputs_sha256
    assert again.losses == pytest.approx(reference.losses, rel=1e-12)
    assert np.array_equal(again.codebook, reference.codebook)
    for name, codes in again.codes.items():
        assert np.array_equal(codes, reference.codes[name])
        np.testing.assert_allclose(again.scales[name], reference.scales[name], rtol=1e-12)
    for name, gradient in again.gradients.items():  # both are stored in fp32
        np.testing.assert_allclose(gradient, reference.gradients[name], rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(again.adapter[name], reference.adapter[name], rtol=1e-7, atol=1e-12)


def test_references_are_written_as_they_are_read(reference: Reference, tmp_path: Path) -> None:
    values, tensors = tmp_path / "values.json", tmp_path / "tensors.safetensors"
    save_reference(reference, values=values, tensors=tensors)
    assert values.read_bytes() == (ROOT / "qlora_kit/doctor/references.json").read_bytes()
    shipped = (ROOT / "qlora_kit/doctor/references.safetensors").read_bytes()
    assert tensors.read_bytes() == shipped
    assert len(shipped) < 300_000


def test_a_wheel_and_a_source_archive_carry_the_references() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["qlora_kit"]
    manifest = (ROOT / "MANIFEST.in").read_text()
    for name in ("doctor/references.json", "doctor/references.safetensors"):
        assert any(fnmatch(name, pattern) for pattern in patterns)
        assert f"qlora_kit/{name}" in manifest


def test_the_subject_is_exact_in_16_bits_and_spreads_over_all_codes(reference: Reference) -> None:
    for name, weight in subject.base_weights().items():
        for dtype in (torch.bfloat16, torch.float16):
            assert np.array_equal(torch.from_numpy(weight).to(dtype).double().numpy(), weight), name
    assert set(np.concatenate([codes.ravel() for codes in reference.codes.values()])) == set(range(16))
    assert max(len(scales) for scales in reference.scales.values()) > 256
    for batch in subject.batches():
        assert (batch.attention_mask == 0).any()
        assert ((batch.labels == subject.IGNORED) & (batch.attention_mask == 1)).any()


def test_rounding_to_bf16_is_torchs() -> None:
    values = np.concatenate(
        [subject.adapter_weights()[f"{Q_PROJ}.lora_A"].ravel() * 1.01, [0.0, 1.00390625, 1.01171875]]
    )
    assert np.array_equal(round_to_bf16(values), torch.from_numpy(values).to(torch.bfloat16).double().numpy())
