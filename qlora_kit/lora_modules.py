"""Whether the modules that a config's ``lora`` section names are there, before anything of the base is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from qlora_kit.adapters.module_pattern import module_matcher, names_module, pattern_names_end_of
from qlora_kit.architecture import EMBEDDING, HEAD, Architecture
from qlora_kit.base_files import BaseRef
from qlora_kit.config import LoraSection
from qlora_kit.errors import BaseModelError, ConfigError, Fault
from qlora_kit.prequantized import STATE, described_shapes
from qlora_kit.safetensors_header import locate_tensors
from qlora_kit.suggest import nearest

_END = ".weight"


@dataclass(frozen=True)
class _Modules:
    """What stands in a base, by the names that PEFT gives it.

    Attributes:
        base: What the base is called.
        all: Every module, those that hold others too.
        matrices: Those that LoRA takes: layers' matrices and an untied head.
        in_4bit: Those whose weights are 4-bit codes once the base is loaded.
    """

    base: str
    all: frozenset[str]
    matrices: frozenset[str]
    in_4bit: frozenset[str] = frozenset()

    def in_codes(self, packed: frozenset[str] = frozenset()) -> _Modules:
        """The same once it is loaded in 4 bits: those ``packed`` already, else every matrix but the head."""
        return replace(self, in_4bit=packed or frozenset(one for one in self.matrices if _last(one) != HEAD))


def require_lora_modules(ref: BaseRef, lora: LoraSection, *, load_in_4bit: bool) -> None:
    """Compare every module name of ``lora`` with the headers of the base's weight files, by PEFT's rules.

    PEFT itself goes on without those that it does not find, but for ``target_modules``.

    Args:
        ref: The base.
        lora: The section.
        load_in_4bit: Whether its layers will hold 4-bit codes, which cannot be trained whole.

    Raises:
        ConfigError: Names, or patterns, that match nothing, or nothing that can be trained so; with every such name.
        BaseModelError: The weight files are damaged.
    """
    tensors = locate_tensors(ref.path, error=BaseModelError)
    modules = _modules_of(ref.id, described_shapes(tensors))
    packed = frozenset(name.partition(f"{_END}.{STATE}")[0] for name in tensors if f"{_END}.{STATE}" in name)
    _require(modules.in_codes(packed) if load_in_4bit else modules, lora)


def require_planned_modules(base: str, architecture: Architecture, lora: LoraSection, *, load_in_4bit: bool) -> None:
    """The same from the base's ``config.json`` alone, for which no weight file has to be there.

    Args:
        base: What the base is called.
        architecture: Of it.
        lora: The section.
        load_in_4bit: Whether all its layers will hold 4-bit codes; of a base that is quantized already, which do is
            known from its weight files only.

    Raises:
        ConfigError: As ``require_lora_modules``.
    """
    modules = _modules_of(base, {name: plan.shape for name, plan in architecture.tensors().items()})
    _require(modules.in_codes() if load_in_4bit else modules, lora)


def _require(modules: _Modules, lora: LoraSection) -> None:
    faults = [
        *_target_faults(lora.target_modules, modules),
        *_excluded_faults(lora.exclude_modules, modules),
        *_saved_faults(lora.modules_to_save, modules),
    ]
    faults = faults or [
        *_pattern_faults("rank_pattern", lora.rank_pattern, _adapted(lora, modules), modules.base),
        *_pattern_faults("alpha_pattern", lora.alpha_pattern, _adapted(lora, modules), modules.base),
    ]
    if faults:
        raise ConfigError.of(faults)


def _modules_of(base: str, shapes: Mapping[str, tuple[int, ...]]) -> _Modules:
    """What stands in a base with tensors of these shapes, none of them in 4-bit codes."""
    matrices = frozenset(
        name.removesuffix(_END)
        for name, shape in shapes.items()
        if name.endswith(_END) and len(shape) == 2 and _last(name.removesuffix(_END)) != EMBEDDING  # of another kind
    )
    every = {HEAD}  # also where it is the embedding, and no tensor of its own
    for name in shapes:
        parts = name.split(".")
        every.update(".".join(parts[:size]) for size in range(1, len(parts)))
    return _Modules(base, frozenset(every), matrices)


def _target_faults(targets: str | tuple[str, ...], modules: _Modules) -> Iterator[Fault]:
    if targets != "all-linear":
        fix = "use all-linear, or a list of names above"
        yield from _unmatched("target_modules", targets, modules.matrices, modules.matrices, fix, modules.base)


def _excluded_faults(excluded: str | tuple[str, ...] | None, modules: _Modules) -> Iterator[Fault]:
    if excluded:
        known = modules.matrices | {HEAD, EMBEDDING}
        yield from _unmatched("exclude_modules", excluded, known, modules.matrices, "remove it", modules.base)


def _saved_faults(saved: tuple[str, ...], modules: _Modules) -> Iterator[Fault]:
    free = frozenset(module for module in modules.all if _is_free(module, modules.in_4bit))
    shown = frozenset(module for module in free if not _holds_others(module, modules.all))
    for name in saved:
        found = {module for module in modules.all if module.endswith(name)}  # as PEFT looks
        missing = [*_unmatched("modules_to_save", (name,), modules.all, shown, "remove it", modules.base)]
        yield from missing
        if not missing and not found <= free:
            yield Fault(
                f"lora.modules_to_save: {name!r} is held in 4-bit codes, which cannot be trained whole",
                f"modules that stay in 16 bits: {_named(shown)}",
                "leave it to LoRA (lora.target_modules), or set quantization.load_in_4bit to false",
            )
        elif not missing and not found <= shown:
            inner = {module for module in shown if any(module.startswith(f"{outer}.") for outer in found)}
            yield Fault(
                f"lora.modules_to_save: {name!r} holds other modules, which the gate lets no adapter bring with it",
                f"modules with weights of their own: {_named(shown)}",
                f"name those inside it: [{_named(inner)}]",
            )


def _pattern_faults(key: str, patterns: Mapping[str, float], adapted: frozenset[str], base: str) -> Iterator[Fault]:
    for pattern in patterns:
        if not any(pattern_names_end_of(pattern, module) for module in adapted):
            match = nearest(_last(pattern), {_last(module) for module in adapted})
            fix = "remove it, or name one of the above" if match is None else f"did you mean {match}?"
            what = f"lora.{key}: {pattern!r} matches no module of {base} that gets an adapter"
            yield Fault(what, f"the end of a module's name, or a pattern of it: {_named(adapted)}", fix)


def _unmatched(
    key: str, choice: str | tuple[str, ...], known: frozenset[str], shown: frozenset[str], fix: str, base: str
) -> Iterator[Fault]:
    """A fault for each name, or the pattern, that none of ``known`` answers to; those ``shown`` are proposed."""
    kind, named = (
        ("pattern", {choice: choice}) if isinstance(choice, str) else ("name", {one: (one,) for one in choice})
    )
    matchers = {name: module_matcher(one) for name, one in named.items()}
    missing = [name for name, matcher in matchers.items() if not any(names_module(matcher, one) for one in known)]
    expected = f"modules of the base: {_named(shown)}"
    if kind == "pattern":
        expected += "; a pattern matches a whole name such as model.layers.0.self_attn.q_proj"
    names = sorted({_last(module) for module in shown})
    thing = "module" if key == "modules_to_save" else "matrix"
    for name in missing:
        match = name if name in names else nearest(_last(name), names)
        advice = fix if match is None else f"did you mean [{match}]?"
        yield Fault(f"lora.{key}: the {kind} {name!r} matches no {thing} of {base}", expected, advice)


def _adapted(lora: LoraSection, modules: _Modules) -> frozenset[str]:
    """The modules that get a pair."""
    targeted, excluded = module_matcher(lora.target_modules), module_matcher(lora.exclude_modules or ())
    return frozenset(
        module
        for module in modules.matrices
        if names_module(targeted, module)
        and not names_module(excluded, module)
        and not any(f".{name}." in f".{module}." for name in lora.modules_to_save)
    )


def _is_free(module: str, in_4bit: frozenset[str]) -> bool:
    """Whether neither ``module`` nor one inside of it holds 4-bit codes."""
    return not any(f"{inner}.".startswith(f"{module}.") for inner in in_4bit)


def _holds_others(module: str, every: frozenset[str]) -> bool:
    return any(other.startswith(f"{module}.") for other in every)


def _named(modules: Iterable[str]) -> str:
    return ", ".join(sorted({_last(module) for module in modules}))


def _last(module: str) -> str:
    return module.rpartition(".")[2]
