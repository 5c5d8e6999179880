"""Reference energies per element and level of theory, and the scale of what a network adds to them.

Numpy in float64, outside the network on purpose: a cast of the parameters to bfloat16 must not touch totals
of thousands of eV.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equipot.model.config import ModelConfig
from equipot.model.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Total energy = Σ scale[level] · ε_i + Σ energy[level, element of i]."""

    energy: NDArray[np.float64]
    """(n_levels, n_elements) eV per atom, columns in the order of ``ModelConfig.elements``."""
    scale: NDArray[np.float64]
    """(n_levels,) eV; positive."""

    def __post_init__(self) -> None:
        for name in ("energy", "scale"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.energy.ndim != 2 or self.scale.shape != self.energy.shape[:1]:
            raise ModelError(
                f"references: energy has shape {self.energy.shape} and scale {self.scale.shape}; "
                "give (n_levels, n_elements) and (n_levels,)"
            )
        if not np.isfinite(self.energy).all():
            raise ModelError("references: energy holds a value that is not finite; put 0 where none is known")
        if not (np.isfinite(self.scale) & (self.scale > 0)).all():
            raise ModelError(f"references: scale is {self.scale.tolist()}; give positive numbers")

    def check_against(self, config: ModelConfig) -> None:
        """Refuses references made for other levels of theory or elements.

        Raises:
            ModelError: the number of levels or elements differs from the config's.
        """
        expected = (len(config.levels_of_theory), len(config.elements))
        if self.energy.shape != expected:
            raise ModelError(
                f"references: energy has shape {self.energy.shape}, the model config has {expected[0]} "
                f"levels of theory and {expected[1]} elements; fit the references for this config"
            )

    def to_json(self) -> dict[str, Any]:
        """The references as JSON types; floats keep every bit."""
        return {"energy": self.energy.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The references that `to_json` wrote.

        Raises:
            ModelError: a key is missing or unknown, or the numbers make no table.
        """
        if set(data) != {"energy", "scale"}:
            raise ModelError(f"references: keys are {sorted(data)}; expected energy and scale")
        try:
            return cls(energy=data["energy"], scale=data["scale"])
        except (TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"references: not a table of numbers ({error})") from error
