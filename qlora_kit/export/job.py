"""One export as it was asked for, every option checked against its format before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.errors import ConfigError, Fault
from qlora_kit.export.results import Produced
from qlora_kit.export.source import ExportSource, Kind, Progress
from qlora_kit.merging.onto import Onto
from qlora_kit.suggest import advice

StageProgress = Callable[[str, int, int], None]
"""Called with what is being done, and the bytes done and in all; both 0 where something begins that is not counted."""


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        sources: What is exported; one, but for formats that take several.
        out: The folder to make.
        quant: How weights are quantized; None for the format's default.
        base: In place of the base that a contract names.
        onto: What adapters are merged onto, or served on.
        check: Run what was written in another program, where it is installed.
        separate: Keep base and adapter apart.
        progress: Told of the bytes done in each stage.
    """

    sources: tuple[ExportSource, ...]
    out: Path
    quant: str | None = None
    base: str | None = None
    onto: Onto = "auto"
    check: bool = False
    separate: bool = False
    progress: StageProgress | None = None

    @property
    def source(self) -> ExportSource:
        """The one thing to export."""
        return self.sources[0]

    def stage(self, what: str) -> Progress | None:
        """A progress function for one stage."""
        told = self.progress
        if told is None:
            return None

        def tell(done_bytes: int, total_bytes: int) -> None:
            told(what, done_bytes, total_bytes)

        return tell

    def begin(self, what: str) -> None:
        """Say that work begins whose bytes are not counted."""
        if self.progress is not None:
            self.progress(what, 0, 0)


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
        kinds: What can be exported to it.
        quants: What ``quant`` may be, the default first; empty where there is no choice.
        options: Which of ``base``, ``onto``, ``check``, ``separate``, ``several`` have an effect.
        write: Checks the job, then writes the files into an empty folder.
    """

    kinds: tuple[Kind, ...]
    quants: tuple[str, ...]
    options: frozenset[str]
    write: Callable[[ExportJob, Path], Produced]


_KINDS = {"adapter": "an adapter", "merged": "a merged folder", "base": "a base"}


def require_possible(name: str, target: Target, job: ExportJob) -> None:
    """Refuse what has no meaning for a format, all of it at once.

    Raises:
        ConfigError: With every such option and source.
    """
    faults = []
    takes = " or ".join(_KINDS[kind] for kind in target.kinds)
    for source in job.sources:
        if source.kind not in target.kinds:
            what = f"{source.folder}: is {_KINDS[source.kind]}, which is not exported to {name}"
            fix = _OTHER_WAYS.get((name, source.kind), f"give {takes}")
            faults.append(Fault(what, takes, fix))
    if job.quant is not None and job.quant not in target.quants:
        expected = f"one of {', '.join(target.quants)}" if target.quants else "no --quant"
        what = f"--quant {job.quant}: {name} has no such quantization"
        fix = advice(job.quant, target.quants) if target.quants else "leave --quant out"
        faults.append(Fault(what, expected, fix))
    faults += _option_faults(name, target, job)
    if faults:
        raise ConfigError.of(faults)


def _option_faults(name: str, target: Target, job: ExportJob) -> list[Fault]:
    asked = {
        "base": job.base is not None,
        "onto": job.onto != "auto",
        "check": job.check,
        "separate": job.separate,
        "several": len(job.sources) > 1,
    }
    texts = {
        "several": ("several sources", "one adapter, merged folder or base", "export them one by one"),
        "check": ("--check", "a format that another program can be asked about", "leave --check out"),
    }
    faults = []
    for option, is_asked in asked.items():
        if is_asked and option not in target.options:
            default = (f"--{option}", f"no --{option}", f"leave --{option} out")
            what, expected, fix = texts.get(option, default)
            faults.append(Fault(f"{what} with --to {name}: has no effect there", expected, fix))
    adapters = [source for source in job.sources if source.kind == "adapter"]
    for option in ("base", "onto", "separate"):
        if asked[option] and option in target.options and not adapters and not (name == "base" and option == "onto"):
            what = f"--{option}: only adapters have a base that they are put on; {job.source.folder} is none"
            faults.append(Fault(what, f"an adapter, or no --{option}", f"leave --{option} out"))
    names = _twice([source.name for source in job.sources])
    if names:
        folders = {source.folder.resolve() for source in job.sources if source.name == names[0]}
        fix = "give the other one another name: `qlora-kit adapters rename`" if len(folders) > 1 else "name it once"
        faults.append(Fault(f"two sources have the name {names[0]!r}", "names that differ", fix))
    return faults


def _twice(names: Sequence[str]) -> list[str]:
    return [name for place, name in enumerate(names) if name in names[:place]]


_OTHER_WAYS = {
    ("gguf-lora", "merged"): "give the adapter itself; a merged model is exported with --to gguf",
    ("gguf-lora", "base"): "give an adapter; a base is exported with --to gguf",
    ("vllm", "merged"): "vLLM loads the merged folder as it is: `vllm serve FOLDER`",
    ("vllm", "base"): "vLLM loads a base as it is: `vllm serve BASE`; give the adapters to serve on it",
    ("base", "merged"): "give the base, or an adapter that was trained on it",
}
