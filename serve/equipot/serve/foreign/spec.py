"""Which foreign potential to serve, as the operator writes it. Imports neither torch nor ASE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from equipot.model.elements import MAX_ATOMIC_NUMBER, symbol
from equipot.serve.config_file import read_toml
from equipot.serve.errors import ServeError

ChargeMode = Literal["auto", "refuse", "info", "initial", "parameter"]
"""How a calculator is told of charge and spin multiplicity: not at all; by `atoms.info`; by initial charges
and magnetic moments; by its parameters `charge` and `multiplicity`. "auto" is the last if it has them, else
the first."""

MACE = "mace:"
COST_CUTOFF = 5.0
"""Å within which pairs of atoms are counted where a potential does not say how far it looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalculatorSpec:
    """One foreign potential.

    Attributes:
        calculator: "module:factory" or "file.py:factory" of an ASE calculator, "chgnet", or "mace:FILE".
        name: what callers ask for; empty: the factory's, the package's or the file's.
        level_of_theory: whose total energies it gives; empty: what the calculator is known for.
        elements: symbols or atomic numbers it knows; empty: what it says itself, if it does.
        arguments: keyword arguments of the factory, as JSON.
        outputs: those of them that name files which the calculator writes, and so no weights.
        charge: how charge and spin are passed on.
        cutoff: Å within which pairs count as its work; 0: what it says itself.
        time_limit: seconds that one structure may take.
        python: of the environment in which its packages are; empty: the server's own.

    Raises:
        ServeError: a value that cannot be.
    """

    calculator: str
    name: str = ""
    level_of_theory: str = ""
    elements: tuple[int | str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    charge: ChargeMode = "auto"
    cutoff: float = 0.0
    time_limit: float = 60.0
    python: str = ""

    def __post_init__(self) -> None:
        self.atomic_numbers  # noqa: B018  # wrong ones are refused here
        if self.kind == "ase" and not all(self.calculator.rpartition(":")[::2]):
            raise ServeError(
                f"calculator {self.calculator[:200]!r}: write module:factory as in ase.calculators.emt:EMT,"
                " chgnet, mace:FILE, or the name of a .toml file"
            )
        if self.kind == "mace" and not self.target:
            raise ServeError("calculator mace: needs a model file: mace:FILE")
        if self.charge not in get_args(ChargeMode):
            raise ServeError(
                f"calculator {self.calculator}: charge is {self.charge!r}; choose one of"
                f" {', '.join(get_args(ChargeMode))}"
            )
        if unknown := sorted(set(self.outputs) - self.arguments.keys()):
            raise ServeError(
                f"calculator {self.calculator}: outputs holds {unknown[0]!r}, which is none of its arguments"
            )
        if not 0 < self.time_limit <= 86_400:
            raise ServeError(
                f"calculator {self.calculator}: time_limit is {self.time_limit}, allowed are 0 to 86400 s"
            )
        if not 0 <= self.cutoff <= 50:
            raise ServeError(f"calculator {self.calculator}: cutoff is {self.cutoff}, allowed are 0 to 50 Å")

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        """Of its elements, ascending."""
        return tuple(sorted({_element(self.calculator, one) for one in self.elements}))

    @property
    def kind(self) -> Literal["ase", "chgnet", "mace"]:
        """Which package it is of."""
        if self.calculator == "chgnet":
            return "chgnet"
        return "mace" if self.calculator.startswith(MACE) else "ase"

    @property
    def target(self) -> str:
        """The file of a MACE model, or module and factory of a calculator."""
        return self.calculator.removeprefix(MACE) if self.kind == "mace" else self.calculator

    @property
    def file(self) -> Path | None:
        """Of the model or of the factory; None where it is a module or a package's own."""
        return _file_in(self.calculator)

    @property
    def shown_name(self) -> str:
        """What callers ask for."""
        if self.name:
            return self.name
        if self.kind == "chgnet":
            return "chgnet"
        return Path(self.target).stem if self.kind == "mace" else self.target.rpartition(":")[2].lower()


def anchored(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a calculator with paths as they are from `folder` on: of its file, and of its Python."""
    fields = dict(table)
    calculator, python = fields.get("calculator"), fields.get("python")
    if isinstance(calculator, str) and (file := _file_in(calculator)) is not None:
        whole = folder / file.expanduser()
        is_mace = calculator.startswith(MACE)
        fields["calculator"] = f"{MACE}{whole}" if is_mace else f"{whole}:{calculator.rpartition(':')[2]}"
    if isinstance(python, str) and "/" in python:
        fields["python"] = str(folder / Path(python).expanduser())
    return fields


def _file_in(calculator: str) -> Path | None:
    if calculator.startswith(MACE):
        return Path(calculator.removeprefix(MACE)) if calculator != MACE else None
    place = calculator.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


def calculators(
    words: Sequence[str], *, arguments: str = "", level_of_theory: str = ""
) -> list[dict[str, Any]]:
    """What `--calculator` says, as a configuration has it; files are meant from this folder on, and in a
    .toml file from its own.

    Args:
        words: calculators, or names of .toml files with the fields of `CalculatorSpec`.
        arguments: keyword arguments of the only one as a JSON object, in place of its file's.
        level_of_theory: of the only one, in place of its file's.

    Raises:
        ServeError: a file or the arguments cannot be read, or it is not clear whose they are.
    """
    tables = [
        anchored(read_toml(Path(word)), Path(word).absolute().parent)
        if word.endswith(".toml")
        else anchored({"calculator": word}, Path.cwd())
        for word in words
    ]
    if (arguments or level_of_theory) and len(tables) != 1:
        raise ServeError(
            "--calculator-arguments and --level-of-theory are about one --calculator: write a .toml file for"
            " each of several"
        )
    if arguments:
        try:
            tables[0]["arguments"] = json.loads(arguments)
        except ValueError as error:
            raise ServeError(f"--calculator-arguments is no JSON: {error}") from None
    if level_of_theory:
        tables[0]["level_of_theory"] = level_of_theory
    return tables


def _element(calculator: str, one: object) -> int:
    numbers = {symbol(number): number for number in range(1, MAX_ATOMIC_NUMBER + 1)}
    number = numbers.get(one, 0) if isinstance(one, str) else one
    if not isinstance(number, int) or not 1 <= number <= MAX_ATOMIC_NUMBER:
        raise ServeError(f"calculator {calculator}: elements holds {one!r}; give symbols or atomic numbers")
    return number
