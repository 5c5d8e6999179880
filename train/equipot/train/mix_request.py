"""What a mix is to be made of, as a TOML file checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from equipot.train.errors import DataError
from equipot.train.sections import Section, explain
from equipot.train.splits import Caps

FRACTIONS = (0.8, 0.1, 0.1)


class SourceRequest(Section):
    """[sources.NAME]: one store, and what is taken of it."""

    store: Path = Field(description="a packed store; relative paths are relative to the file")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often an epoch sees a training structure: 2 twice each, 0.5 every second one",
    )
    max_structures: int | None = Field(
        default=None, ge=1, description="at most so many of the source, by whole groups drawn by the seed"
    )
    max_per_group: int | None = Field(
        default=None, ge=1, description="at most so many of a group, evenly spread over it"
    )
    max_atoms: int | None = Field(
        default=None, ge=1, description="structures with more atoms are left out of all splits"
    )
    level_of_theory: str | None = Field(
        default=None, description="what the store has to be of; refused if it is of another"
    )

    @property
    def caps(self) -> Caps:
        """What is taken of the store before it is split."""
        return Caps(self.max_structures, self.max_per_group, self.max_atoms)

    @property
    def exact_weight(self) -> Fraction:
        """The weight as the decimal number it was written as, to a millionth."""
        return Fraction(repr(self.weight)).limit_denominator(10**6)


class MixRequest(Section):
    """A mix; seed and fractions stand before the first [sources.NAME] of the file."""

    seed: int = Field(default=0, ge=0, description="decides splits, subsets and what caps leave out")
    fractions: tuple[float, float, float] = Field(
        default=FRACTIONS, description="shares of training, validation and test of every source; sum 1"
    )
    sources: dict[str, SourceRequest] = Field(
        min_length=1, description="the stores by name, as [sources.NAME] with store = …"
    )

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> MixRequest:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6 or self.fractions[0] == 0:
            raise ValueError(
                f"fractions = {list(self.fractions)} must be non-negative, add up to 1 and train on something"
            )
        return self


def load_request(path: Path) -> MixRequest:
    """Reads a mix file; its relative paths become relative to the working directory.

    Raises:
        DataError: no such file, not TOML, an unknown key or a value out of range; each named, on one line.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}") from None
    request = parse_request(values, str(path))
    sources = {
        name: source.model_copy(update={"store": path.parent / source.store})
        for name, source in request.sources.items()
    }
    return request.model_copy(update={"sources": sources})


def parse_request(values: Mapping[str, object], source: str) -> MixRequest:
    """Checks a request given as plain values; `source` is how error messages call it."""
    try:
        return MixRequest.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{source}: {explain(error, MixRequest, 'file')}") from None


def of_stores(
    stores: Sequence[Path], names: Sequence[str], seed: int, fractions: Sequence[float]
) -> MixRequest:
    """Everything of these stores, each once; a name that is taken gets a number."""
    sources: dict[str, dict[str, object]] = {}
    for path, name in zip(stores, names, strict=True):
        free, count = name, 1
        while free in sources:
            count += 1
            free = f"{name}-{count}"
        sources[free] = {"store": path}
    return parse_request({"seed": seed, "fractions": fractions, "sources": sources}, "the mix")
