"""Several potentials as one: their mean is the prediction, their spread says how far they agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipot.model.batch import SystemBatch
from equipot.model.inference import FrozenPotential, Way
from equipot.model.potential import Prediction


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Standard deviations of the members around their mean, dividing by their number.

    Attributes:
        energy: (S,) float64 eV, of the total energy.
        forces: (N,) eV/Å: the root of the mean square distance of the members' forces to their mean, which
            does not change when the structure is turned; None when forces were not asked for.
    """

    energy: Tensor
    forces: Tensor | None


class Ensemble:
    """Members of one configuration for inference. Of one alone the spread is unknown, not zero."""

    def __init__(self, members: Sequence[FrozenPotential]) -> None:
        """Joins at least one."""
        self.members = tuple(members)

    @property
    def way(self) -> Way:
        """How they compute; see `FrozenPotential`."""
        return self.members[0].way

    @property
    def batch_invariant(self) -> bool:
        """Whether a structure gets the same bits in any batch by itself."""
        return self.members[0].batch_invariant

    def __call__(
        self,
        batch: SystemBatch,
        *,
        forces: bool = True,
        stress: bool = False,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> tuple[Prediction, Spread | None]:
        """The mean of the members and their spread; arguments as of `FrozenPotential`.

        Raises:
            ModelError: stress was asked of a model with direct forces.
        """
        found = [
            member(batch, forces=forces, stress=stress, deterministic=deterministic, threads=threads)
            for member in self.members
        ]
        if len(found) == 1:
            return found[0], None
        energy, energy_spread = _mean_and_spread([one.energy for one in found])
        mean_forces = forces_spread = mean_stress = None
        if forces:
            mean_forces, by_component = _mean_and_spread([_present(one.forces) for one in found])
            forces_spread = torch.linalg.vector_norm(by_component, dim=-1)
        if stress:
            mean_stress, _ = _mean_and_spread([_present(one.stress) for one in found])
        return Prediction(energy, mean_forces, mean_stress), Spread(energy_spread, forces_spread)


def _mean_and_spread(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """By differences to the first: members that agree have a spread of exactly zero at any energy."""
    first = values[0]
    off = torch.stack([value - first for value in values])
    return first + off.mean(0), off.std(0, correction=0)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
