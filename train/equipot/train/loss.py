"""Energy, force and stress losses, normalised so that ranks and micro-batches add up to one mean.

Each term is a mean over what the *global* batch has of that label: structures for energies (per atom),
components for forces and stress. A rank adds up its own part divided by the global count; the sum over
ranks is the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from equipot.model.batch import SystemBatch
from equipot.model.potential import Potential, Prediction
from equipot.train.dataset import Targets
from equipot.train.recipe import LossSection

TERMS = ("energy", "forces", "stress")


@dataclass(frozen=True, slots=True)
class Counts:
    """Labels present in a global batch: structures with energy, force components, stress components."""

    energy: float
    forces: float
    stress: float

    @staticmethod
    def of(targets: Targets) -> list[float]:
        """Counts of one batch, to be added up over micro-batches and ranks."""
        return [
            float(torch.isfinite(labels).sum()) for labels in (targets.energy, targets.forces, targets.stress)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Prediction minus label, zero where there is no label, with masks of what there is."""

    energy: Tensor
    """(S,) float64 eV/atom"""
    forces: Tensor
    """(N, 3) eV/Å"""
    stress: Tensor
    """(S, 3, 3) eV/Å³"""
    has_energy: Tensor
    has_forces: Tensor
    has_stress: Tensor


def residuals(prediction: Prediction, targets: Targets, systems: SystemBatch) -> Residuals:
    """Compare a prediction with labels."""
    n_atoms = torch.bincount(systems.system_idx, minlength=systems.n_systems)
    energy, has_energy = _difference(prediction.energy, targets.energy)
    forces, has_forces = _difference(prediction.forces, targets.forces)
    stress, has_stress = _difference(prediction.stress, targets.stress)
    return Residuals(energy / n_atoms, forces, stress, has_energy, has_forces, has_stress)


def _difference(predicted: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    if predicted is None:
        return torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
    present = torch.isfinite(labels)
    # where() before the subtraction: NaN times zero would still poison the gradient
    return torch.where(present, predicted, 0) - torch.where(present, labels, 0).to(predicted.dtype), present


def penalty(residual: Tensor, loss: LossSection) -> Tensor:
    """The chosen penalty of every residual, elementwise."""
    zeros = torch.zeros_like(residual)
    if loss.kind == "mse":
        return residual.square()
    if loss.kind == "mae":
        return residual.abs()
    return functional.huber_loss(residual, zeros, reduction="none", delta=loss.huber_delta)


def terms_per_structure(found: Residuals, systems: SystemBatch, loss: LossSection) -> Tensor:
    """Penalties (3, S) float64 of each structure: energy, force components, stress components, summed."""
    energy = penalty(found.energy, loss)
    forces = energy.new_zeros(systems.n_systems).index_add(
        0, systems.system_idx, penalty(found.forces, loss).sum(-1).double()
    )
    stress = penalty(found.stress, loss).sum((-1, -2)).double()
    return torch.stack([energy, forces, stress])


def predict(potential: Potential, systems: SystemBatch, *, forces: bool, stress: bool) -> Prediction:
    """Call a potential that may be under ZeRO-3, whose hooks on a module cannot take its output apart.

    The potential holds no weights itself; the modules inside, which do, are called with their hooks.
    """
    return potential.forward(systems, forces=forces, stress=stress)


class LossModule(nn.Module):
    """A potential and its loss as one module, as DeepSpeed wants them."""

    def __init__(self, potential: Potential, loss: LossSection, *, two_passes: bool = False) -> None:
        """Args:
        potential: what is trained.
        loss: the weights and penalties of its errors.
        two_passes: differentiate conservative forces without a second backward pass through the weights,
            which ZeRO-3 cannot provide: see :meth:`_in_two_passes`.
        """
        super().__init__()
        self.potential = potential
        self._loss = loss
        conservative = potential.config.forces == "conservative"
        # A direct head always computes: ZeRO wants a gradient, if a zero one, for each of its weights.
        self._forces = loss.forces > 0 or not conservative
        by_gradient = conservative and (self._forces or loss.stress > 0)
        self._two_passes = two_passes and by_gradient

    def forward(
        self, systems: SystemBatch, targets: Targets, counts: Counts, ranks: int
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the loss, times the number of ranks, and its unweighted terms (3, S).

        DeepSpeed averages gradients over ranks; the factor makes that a sum.
        """
        if self._two_passes:
            loss, terms = self._in_two_passes(systems, targets, counts)
        else:
            prediction = predict(self.potential, systems, forces=self._forces, stress=self._loss.stress > 0)
            loss, terms = self._of(prediction, systems, targets, counts)
        return loss * ranks, terms.detach()

    def draw_parameters(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Fresh weights by name, one at a time: see :meth:`Potential.draw_parameters`."""
        for name, values in self.potential.draw_parameters(generator):
            yield f"potential.{name}", values

    def _of(
        self, prediction: Prediction, systems: SystemBatch, targets: Targets, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        terms = terms_per_structure(residuals(prediction, targets, systems), systems, self._loss)
        return (terms.sum(1) * _weights(self._loss, counts, terms)).sum(), terms

    def _in_two_passes(self, systems: SystemBatch, targets: Targets, counts: Counts) -> tuple[Tensor, Tensor]:
        """The loss L(E, F) with the gradient it ought to have, by plain passes forward and backward alone.

        The first pass gives energies E and pulls p = ∂E/∂r, and with them the numbers g = ∂L/∂E and
        v = ∂L/∂p. By the parameters θ, L then changes as ⟨g, E(θ)⟩ + ⟨v, p(θ)⟩ does, and ⟨v, p⟩ is the
        derivative of the energy along v, which the second pass computes forwards beside the energy.
        """
        energy, pull = (tensor.requires_grad_() for tensor in self.potential.energy_and_pull(systems))
        with torch.enable_grad():
            prediction = self.potential.prediction_of(
                systems, energy, pull, forces=self._forces, stress=self._loss.stress > 0
            )
            loss, terms = self._of(prediction, systems, targets, counts)
            by_energy, by_pull = torch.autograd.grad(loss, (energy, pull), materialize_grads=True)
        energies, slope = self.potential.energy_along(systems, by_pull)
        linear = (by_energy * energies).sum() + slope
        return loss.detach() + (linear - linear.detach()), terms


def weighted(sums: Tensor, loss: LossSection, counts: Counts) -> Tensor:
    """The loss (…) of summed penalties (3, …)."""
    weights = _weights(loss, counts, sums)
    return (sums * weights.view(3, *[1] * (sums.ndim - 1))).sum(0)


def _weights(loss: LossSection, counts: Counts, like: Tensor) -> Tensor:
    values = [getattr(loss, term) / max(getattr(counts, term), 1.0) for term in TERMS]
    return torch.tensor(values, dtype=like.dtype, device=like.device)
