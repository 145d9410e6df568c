"""Which Python, libraries and extras the kit is made for, read from its own package metadata alone; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_kit.doctor.checks import ENVIRONMENT, Check

KIT = "qlora-kit"
_UPPER_BOUNDS = ("<", "<=")


@dataclass(frozen=True)
class Metadata:
    """What the installed kit says about itself.

    Attributes:
        version: Of the kit.
        python: The Python versions it is made for.
        libraries: What it cannot work without, for this platform.
        extras: Each optional extra and what it adds.
    """

    version: str
    python: SpecifierSet
    libraries: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]]


def read_metadata() -> Metadata | None:
    """The metadata of the installed kit; None where it is run without being installed."""
    try:
        content = metadata(KIT)
    except PackageNotFoundError:
        return None
    requirements = [Requirement(line) for line in requires(KIT) or ()]
    return Metadata(
        version=content["Version"],
        python=SpecifierSet(content["Requires-Python"] or ""),
        libraries=tuple(item for item in requirements if _applies(item, "")),
        extras={
            extra: tuple(item for item in requirements if not _applies(item, "") and _applies(item, extra))
            for extra in content.get_all("Provides-Extra") or ()
        },
    )


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def installed_versions(requirements: Iterable[Requirement]) -> dict[str, str | None]:
    """The installed version of each requirement by its name; None where there is none."""
    return {requirement.name: _installed_version(requirement.name) for requirement in requirements}


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shown(allowed: SpecifierSet) -> str:
    """The bounds of a range, the lower one first."""
    return ",".join(sorted((str(bound) for bound in allowed), reverse=True))


def check_kit(found: Metadata | None) -> Check:
    """Whether the kit is installed: without its metadata nothing says which versions it needs."""
    if found is None:
        detail = "runs without being installed, so that the versions it needs are not known"
        return Check(KIT, False, detail, "pip install --editable . (in the clone), or install the wheel")
    return Check(KIT, True, found.version)


def check_python(found: str, allowed: SpecifierSet) -> Check:
    """Whether this Python may run the kit."""
    if allowed.contains(found, prereleases=True):
        return Check("Python", True, f"{found} ({shown(allowed)})")
    fix = f"make a virtual environment with Python {shown(allowed)}, and install the kit there"
    return Check("Python", False, f"{found}, the kit needs {shown(allowed)}", fix, ENVIRONMENT)


def check_library(requirement: Requirement, found: str | None) -> Check:
    """Whether a library is there in a version of the tested range.

    Missing or too old stops the kit; a newer version than any tested one may work, so that it is a warning.
    """
    name, allowed = requirement.name, shown(requirement.specifier)
    fix = f'pip install "{name}{allowed}"'
    if found is None:
        return Check(name, False, f"missing, the kit needs {allowed or 'any version'}", fix, ENVIRONMENT)
    broken = [bound for bound in requirement.specifier if not bound.contains(found, prereleases=True)]
    if not broken:
        return Check(name, True, f"{found} ({allowed})" if allowed else found)
    if all(bound.operator in _UPPER_BOUNDS for bound in broken):
        return Check(name, False, f"{found} is newer than what was tested ({allowed})", fix)
    return Check(name, False, f"{found}, the kit needs {allowed}", fix, ENVIRONMENT)


def check_extra(extra: str, requirements: Iterable[Requirement], found: Mapping[str, str | None]) -> Check:
    """Whether an optional extra is installed; where it is not, which is no fault, the line that installs it."""
    name = f"extra {extra}"
    lacking = [item.name for item in requirements if not _satisfies(item, found[item.name])]
    if not lacking:
        return Check(name, True, "installed")
    return Check(name, None, f'not installed ({", ".join(lacking)}): pip install "{KIT}[{extra}]"')


def _satisfies(requirement: Requirement, found: str | None) -> bool:
    return found is not None and requirement.specifier.contains(found, prereleases=True)
