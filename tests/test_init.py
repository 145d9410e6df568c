"""`qlora-kit init` lays out a folder in which training works, from a clone and from an installed wheel alike."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import qlora_kit.starter
from qlora_kit.cli import main
from qlora_kit.config import load_config
from qlora_kit.errors import OutputError
from qlora_kit.starter import copy_starter, lay_out
from qlora_kit.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
WHAT_A_WHEEL_IS_MADE_OF = (
    "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "qlora_kit", "configs", "datasets",
    "adapters",
)  # fmt: skip


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone in small, the package's own place in it included: init reads from it."""
    root = tmp_path / "clone"
    texts = {
        "configs/sentiment.yaml": "name: sentiment",
        "configs/accelerate/two.yaml": "n: 2",
        "datasets/sentiment/train.csv": "text,label",
        "datasets/mine/train.csv": "private",
        "adapters/sentiment/adapter_config.json": "{}",
        "adapters/mine/adapter_config.json": "{}",
        "adapters/.lock": "",
        "README.md": "readme",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(qlora_kit.starter, "PACKAGE", root / "qlora_kit")
    monkeypatch.setattr(qlora_kit.starter, "PACKAGED", root / "qlora_kit" / "starter")
    return root


def test_every_config_finds_its_data_in_the_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new"
    starter = lay_out(folder)
    assert set(starter.datasets) == set(TASKS)
    assert {f"configs/{task}.yaml" for task in TASKS} <= set(starter.configs)
    monkeypatch.chdir(folder)
    for name in (name for name in starter.configs if Path(name).parent == Path("configs")):  # not accelerate's own
        config = load_config(Path(name))
        for files in (config.data.train, config.data.validation, config.data.test):
            for file in [files] if isinstance(files, str) else files or []:
                found = config.resolve(file).resolve()
                assert found.is_relative_to(folder.resolve())
                assert filecmp.cmp(found, ROOT / file, shallow=False)


def test_only_the_kits_own_files_are_laid_out(clone: Path, tmp_path: Path) -> None:
    starter = lay_out(tmp_path / "new")
    assert files_of(tmp_path / "new") == {
        "configs/sentiment.yaml",
        "configs/accelerate/two.yaml",
        "datasets/sentiment/train.csv",
        "adapters/sentiment/adapter_config.json",
    }
    assert starter.configs == ("configs/accelerate/two.yaml", "configs/sentiment.yaml")
    assert (starter.datasets, starter.adapters) == (("sentiment",), ("sentiment",))


def test_a_wheels_starter_lays_out_the_same(clone: Path, tmp_path: Path) -> None:
    lay_out(tmp_path / "from-clone")
    copy_starter(clone, qlora_kit.starter.PACKAGED)
    shutil.rmtree(clone / "configs")
    lay_out(tmp_path / "from-wheel")
    assert files_of(tmp_path / "from-wheel") == files_of(tmp_path / "from-clone")


def test_without_shipped_adapters_the_store_is_empty(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / "adapters")
    assert lay_out(tmp_path / "new").adapters == ()
    assert (tmp_path / "new" / "adapters").is_dir()


def test_an_empty_folder_is_taken_and_an_occupied_one_refused(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    lay_out(folder)
    before = files_of(folder)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty(.|\n)*never writes over"):
        lay_out(folder)
    assert files_of(folder) == before | {"mine.txt"}
    with pytest.raises(OutputError, match="not a folder"):
        lay_out(folder / "mine.txt")


def test_a_failure_leaves_nothing(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_late(source: Path, target: Path) -> None:
        copy_starter(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(qlora_kit.starter, "copy_starter", fail_late)
    parent = tmp_path / "work"
    parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        lay_out(parent / "new")
    assert list(parent.iterdir()) == []


def test_an_installation_without_starter_files_says_so(clone: Path, tmp_path: Path) -> None:
    shutil.rmtree(clone / "configs")
    with pytest.raises(OutputError, match="carries no configs"):
        lay_out(tmp_path / "new")


def test_the_command_prints_what_it_made(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["init", str(tmp_path / "a"), "--json"], ["init", str(tmp_path / "b")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (None, 0)
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert json.loads(first) == {
        "folder": str(tmp_path / "a"),
        "configs": ["configs/accelerate/two.yaml", "configs/sentiment.yaml"],
        "datasets": ["sentiment"],
        "adapters": ["sentiment"],
    }
    assert "qlora-kit train configs/sentiment.yaml" in rest
    with pytest.raises(SystemExit) as ended:
        main(["init", str(tmp_path / "a")])
    assert ended.value.code == 2


def test_the_build_needs_no_library_but_setuptools() -> None:
    """pip builds in an environment of its own, where setup.py imports this module."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qlora_kit.starter import copy_starter"
    subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains_outside_the_clone(tmp_path: Path) -> None:
    """Only the kit is installed; its dependencies are those of the running interpreter, by path."""
    source = tmp_path / "source"
    source.mkdir()
    for name in WHAT_A_WHEEL_IS_MADE_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=tmp_path)
    (wheel,) = wheels.glob("qlora_kit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert "qlora_kit/starter/configs/sentiment.yaml" in names
    assert "qlora_kit/doctor/references.safetensors" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qlora_kit"}

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "stack.pth").write_text(sysconfig.get_paths()["purelib"])

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = str(python.with_name("qlora-kit"))
    folder = tmp_path / "new"

    def run(*arguments: str, cwd: Path) -> str:
        process = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()[-1]

    assert Path(run(str(python), "-c", "import qlora_kit; print(qlora_kit.__file__)", cwd=tmp_path)).is_relative_to(
        site_packages
    )
    made = json.loads(run(command, "init", str(folder), "--json", cwd=tmp_path))
    assert set(made["datasets"]) == set(TASKS)
    assert made["adapters"] == sorted(path.name for path in (ROOT / "adapters").glob("[!.]*"))
    assert json.loads(run(command, "data", "configs/sentiment.yaml", "--json", cwd=folder))["kept"] > 0
    short = ("train.max_steps=2", "train.per_device_train_batch_size=2")
    result = json.loads(run(command, "train", "configs/sentiment.yaml", *short, "--json", cwd=folder))
    assert result["steps"] == 2
    assert (folder / "runs" / "sentiment" / "adapter_model.safetensors").is_file()
