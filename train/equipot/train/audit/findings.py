"""What an audit says: findings with severity, evidence, remedy and places, and the answer they amount to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from equipot.train.store import Store


class Severity(StrEnum):
    """error: training on it is wrong. warning: look before training. note: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Place:
    """One structure: store, index in it, source file and frame, and what is said of it."""

    store: str
    index: int
    file: str
    frame: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: how bad.
        code: a stable word for programs.
        stores: names of the stores it is about.
        summary: what, in one line.
        evidence: the numbers that show it.
        remedy: what to do.
        places: examples; for pairs, two after each other.
        count: of structures or pairs it is true of, 0 where that does not apply.
    """

    severity: Severity
    code: str
    stores: tuple[str, ...]
    summary: str
    evidence: str
    remedy: str
    places: tuple[Place, ...] = ()
    count: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class NamedStore:
    """A store and what the audit calls it."""

    name: str
    store: Store = field(repr=False)

    def place(self, index: int, detail: str = "") -> Place:
        """Where structure `index` comes from."""
        origin = self.store.origin(index)
        return Place(self.name, index, origin.file, origin.frame, detail)


def name_stores(stores: Sequence[Store]) -> list[NamedStore]:
    """Each by the name of its folder, by its path where two folders have one name."""
    names = [store.path.resolve().name for store in stores]
    return [
        NamedStore(name if names.count(name) == 1 else str(store.path), store)
        for name, store in zip(names, stores, strict=True)
    ]


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first, else as they were found."""
    return sorted(findings, key=lambda finding: list(Severity).index(finding.severity))


def verdict(findings: Sequence[Finding]) -> str:
    """The answer in one line."""
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    warnings = sum(finding.severity is Severity.WARNING for finding in findings)
    if errors:
        also = f" and {warnings} warning(s)" if warnings else ""
        return f"not consistent: {errors} error(s){also}"
    if warnings:
        return f"consistent as far as could be seen, with {warnings} warning(s) to look at"
    return "consistent as far as could be seen"
