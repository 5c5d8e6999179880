"""What a model is: every choice that decides its parameters or its function. Knows nothing of torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from equipot.model.elements import MAX_ATOMIC_NUMBER
from equipot.model.errors import ModelError

_CHOICES = {
    "forces": ("conservative", "direct", "invariant"),
    "inputs": ("invariant", "raw"),
    "normalisation": ("layer", "none"),
    "residual": (True, False, "initial"),
}
MessageForm = Literal["fast", "balanced", "lean", "split", "plain"]
_TUPLES = ("elements", "levels_of_theory", "charges", "spin_multiplicities")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture and the chemistry it covers; validated on construction."""

    architecture: str = "egnn"
    """Name of the backbone in ``equipot.model.potential.BACKBONES``."""
    width: int = 128
    """Channels of every hidden layer; the parameter count grows with its square."""
    layers: int = 3
    """Message-passing layers; the model sees as far as layers · cutoff."""
    cutoff: float = 5.0
    """Radius in Å beyond which two atoms exchange no message."""
    radial: int = 16
    """Radial basis functions between 0 and the cutoff."""
    forces: Literal["conservative", "direct", "invariant"] = "conservative"
    """``conservative``: minus the energy's gradient; ``direct``: an equivariant head of its own;
    ``invariant``: a control of the scaling study, a head of invariants alone, whose forces do not turn."""
    inputs: Literal["invariant", "raw"] = "invariant"
    """``raw``: a control of the scaling study, coordinates as features of atoms; no symmetry is left."""
    residual: bool | Literal["initial"] = True
    """Whether a layer adds to the atoms' features or replaces them; ``initial``: see `residual`."""
    normalisation: Literal["layer", "none"] = "layer"
    """LayerNorm before each layer and before the heads, or nothing."""
    messages: MessageForm | tuple[MessageForm, ...] = "fast"
    """Order of evaluation of the messages: the same function of the same parameters, in more or less time and
    memory; see `messages`. One word, or one for each layer; a head takes the last layer's."""
    elements: tuple[int, ...]
    """Atomic numbers the model knows, ascending."""
    levels_of_theory: tuple[str, ...]
    """Names of the reference methods; one energy (and force) output each."""
    charges: tuple[int, ...] = (0,)
    """Total charges the model knows, ascending; embedded only when there are several."""
    spin_multiplicities: tuple[int, ...] = (0,)
    """Spin multiplicities the model knows, ascending, 0 for "not stated"; embedded only when several."""
    mean_neighbors: float = 1.0
    """Mean number of neighbours in the training split; message sums are divided by its square root."""

    def __post_init__(self) -> None:
        for name in _TUPLES:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("width", "layers", "radial"):
            _require_integer(name, getattr(self, name), at_least=2 if name == "width" else 1)
        for name in ("cutoff", "mean_neighbors"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ModelError(f"model config: {name} is {value!r}; give a positive number")
            object.__setattr__(self, name, float(value))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            # A number is no answer, though 1 == True.
            if value not in choices or not isinstance(value, bool | str):
                words = ", ".join(str(choice).lower() for choice in choices)
                raise ModelError(f"model config: {name} is {value!r}; choose one of {words}")
        if self.inputs == "raw" and self.forces == "conservative":
            raise ModelError(
                "model config: inputs = 'raw' gives energies that are no function of edges, and forces = "
                "'conservative' are derivatives by edges; use forces = 'direct' or 'invariant'"
            )
        self._check_messages()
        if not isinstance(self.architecture, str) or not self.architecture:
            raise ModelError(f"model config: architecture is {self.architecture!r}; give a name")
        self._check_sets()

    def _check_messages(self) -> None:
        if isinstance(self.messages, list):
            object.__setattr__(self, "messages", tuple(self.messages))
        words = self.messages if isinstance(self.messages, tuple) else (self.messages,)
        known = get_args(MessageForm)
        for word in words:
            if word not in known:
                raise ModelError(
                    f"model config: messages holds {word!r}; choose one of {', '.join(known)}, or a list of "
                    "them with one for each layer"
                )
        if isinstance(self.messages, tuple) and len(words) != self.layers:
            raise ModelError(
                f"model config: messages lists {len(words)} words for {self.layers} layer(s); give one word "
                "for all, or one for each"
            )

    @property
    def message_forms(self) -> tuple[MessageForm, ...]:
        """One word for each layer."""
        return self.messages if isinstance(self.messages, tuple) else (self.messages,) * self.layers

    def _check_sets(self) -> None:
        for name in ("elements", "charges", "spin_multiplicities"):
            values = getattr(self, name)
            if not values:
                raise ModelError(f"model config: {name} is empty; name at least one")
            for value in values:
                _require_integer(name, value, at_least={"elements": 1, "spin_multiplicities": 0}.get(name))
            if list(values) != sorted(set(values)):
                raise ModelError(f"model config: {name} is {values}; list each once, ascending")
        if self.elements[-1] > MAX_ATOMIC_NUMBER:
            raise ModelError(
                f"model config: elements holds {self.elements[-1]}; atomic numbers end at {MAX_ATOMIC_NUMBER}"
            )
        levels = self.levels_of_theory
        if not levels or len(set(levels)) != len(levels):
            raise ModelError(f"model config: levels_of_theory is {levels}; name at least one, each once")
        if not all(isinstance(level, str) and level for level in levels):
            raise ModelError(f"model config: levels_of_theory is {levels}; give non-empty names")

    def to_json(self) -> dict[str, Any]:
        """The config as JSON types, one key per field.

        What no bundle has, a control's inputs, is written only where it is chosen: earlier releases do not
        know the key, and read bundles without it.
        """
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
            if (field.name, getattr(self, field.name)) != ("inputs", "invariant")
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote.

        Raises:
            ModelError: a field is missing, unknown or out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ModelError(
                f"model config: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
        if missing := sorted({"elements", "levels_of_theory"} - set(data)):
            raise ModelError(f"model config: field {missing[0]!r} is missing")
        for name in _TUPLES:
            if name in data and not isinstance(data[name], list | tuple):
                raise ModelError(f"model config: {name} is {data[name]!r}; give a list")
        return cls(**data)


def _require_integer(name: str, value: object, *, at_least: int | None) -> None:
    # A bool is an int to Python; `width: true` is still a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"model config: {name} holds {value!r}; give an integer")
    if at_least is not None and value < at_least:
        raise ModelError(f"model config: {name} holds {value}; the least is {at_least}")
