"""Predictions with weights that stay as they are, by the quickest way that this model and machine allow.

An analytic way back, compiled (`inference_compiled`) or in pure torch (`inference_torch`), gives conservative
forces and stress; `Potential` itself gives what needs no way back, and everything for models that these do
not take. Only the latter's gradients make an autograd graph.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from equipot.model import kernels
from equipot.model.batch import SystemBatch
from equipot.model.egnn import EGNN, EGNNLayer
from equipot.model.geometry import sum_by_index
from equipot.model.heads import Embedding, EnergyHead, ForceHead, Lookup
from equipot.model.inference_compiled import CompiledPotential, packed_bytes
from equipot.model.inference_torch import edge_gradients
from equipot.model.messages import MessageSum, PairLinear
from equipot.model.node_linear import NodeLinear
from equipot.model.norm import LayerNorm
from equipot.model.potential import (
    Potential,
    Prediction,
    join_predictions,
    no_stress,
    stress_from_virial,
)

KEEP_BYTES = 512 * 2**20
"""Memory up to which values of edges are kept for the way back; beyond it they are computed twice."""

PACK_BYTES = 2 * 2**30
"""Packed weights may take no more than this; a larger model gains little: its products are large."""

# What the analytic ways differentiate by hand. Anything else in a model, a part replaced or spread over ranks
# included, goes by autograd.
_KNOWN = {Potential, Embedding, Lookup, EGNN, EGNNLayer, MessageSum, PairLinear, EnergyHead, ForceHead}
_KNOWN |= {nn.Embedding, nn.Linear, NodeLinear, LayerNorm, nn.Identity, nn.ModuleList}

Way = Literal["compiled", "analytic", "autograd"]


class FrozenPotential:
    """A potential for inference alone. It reads the weights when made: change them, and make a new one."""

    def __init__(self, potential: Potential, *, way: Way | None = None) -> None:
        """Chooses the way, and packs the weights if it is the compiled one.

        Args:
            potential: is put in eval mode and asked for no gradients from now on. The compiled way keeps
                copies of its weights and lets go of it.
            way: which one to take; None is the quickest that can.

        Raises:
            ValueError: the way cannot be taken with this model on this machine.
        """
        potential = potential.eval().requires_grad_(False)
        self.config = potential.config
        can = _ways(potential)
        if way is not None and way not in can:
            raise ValueError(f"inference: {way!r} is not possible for this model here; choose one of {can}")
        self.way: Way = way or can[0]
        library = kernels.library() if self.way == "compiled" else None
        self._compiled = None if library is None else CompiledPotential(potential, str(library))
        # Weights and their copies together are three times the model.
        self._potential = potential if self._compiled is None else None

    @property
    def batch_invariant(self) -> bool:
        """Whether a structure gets the same bits in any batch by itself, ``deterministic`` or not."""
        return self._compiled is not None

    def __call__(
        self,
        batch: SystemBatch,
        *,
        forces: bool = True,
        stress: bool = False,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> Prediction:
        """As `Potential.forward`, detached always; several threads may call at once.

        Args:
            batch: see there.
            forces: see there.
            stress: see there.
            deterministic: see there. It costs nothing where `batch_invariant` holds.
            threads: how many compute; None is what torch uses. The compiled way alone takes the number from
                here; the others compute with what torch was told.

        Raises:
            ModelError: stress was asked of a model with direct forces.
        """
        if deterministic and not self.batch_invariant:
            return join_predictions([self(one, forces=forces, stress=stress) for one in batch.alone()])
        by_gradient = self.config.forces == "conservative" and (forces or stress)
        if stress and not by_gradient:
            raise no_stress()
        with torch.inference_mode():
            if self._compiled is not None:
                return _compiled(self._compiled, batch, forces, stress, threads or torch.get_num_threads())
            assert self._potential is not None
            if self.way == "analytic" and by_gradient:
                return _analytic(self._potential, batch, forces, stress)
            return self._potential(batch, forces=forces, stress=stress)  # type: ignore[no-any-return]


def _ways(potential: Potential) -> list[Way]:
    """The ways this model can go here, the quickest first."""
    dtypes = {parameter.dtype for parameter in potential.parameters()}
    devices = {parameter.device.type for parameter in potential.parameters()}
    # Blocks are for a processor's caches; in bfloat16 sums need the care that autograd's way takes.
    known = all(type(module) in _KNOWN for module in potential.modules())
    known = known and potential.config.residual != "initial"
    if not known or devices != {"cpu"} or dtypes not in ({torch.float32}, {torch.float64}):
        return ["autograd"]
    if packed_bytes(potential) > PACK_BYTES or kernels.library() is None:
        return ["analytic", "autograd"]
    return ["compiled", "analytic", "autograd"]


def _compiled(
    model: CompiledPotential, batch: SystemBatch, forces: bool, stress: bool, threads: int
) -> Prediction:
    sums = model(batch, forces=forces, virial=stress, keep_bytes=KEEP_BYTES, threads=threads)
    dtype = batch.positions.dtype
    return Prediction(
        energy=torch.from_numpy(sums.energy),
        forces=None if sums.forces is None else torch.from_numpy(sums.forces).to(dtype),
        stress=None
        if sums.virial is None
        else stress_from_virial(batch, torch.from_numpy(sums.virial)).to(dtype),
    )


def _analytic(potential: Potential, batch: SystemBatch, forces: bool, stress: bool) -> Prediction:
    per_edge = batch.n_edges * potential.config.width * potential.config.layers
    keep = 2 * per_edge * potential.embedding.element.weight.element_size() <= KEEP_BYTES
    energies, pull = edge_gradients(potential, batch, keep=keep)
    element_idx = potential.embedding.elements(batch.atomic_numbers)
    force: Tensor | None = None
    if forces:
        force = sum_by_index(pull, batch.receivers, batch.n_atoms)
        force -= sum_by_index(pull, batch.senders, batch.n_atoms)
    virial = None
    if stress:
        outer = batch.edge_vectors().unsqueeze(-1) * pull.unsqueeze(-2)
        virial = sum_by_index(outer, batch.system_idx[batch.receivers], batch.n_systems)
    return Prediction(
        energy=potential.total_energy(batch, energies, element_idx),
        forces=force,
        stress=None if virial is None else stress_from_virial(batch, virial).to(pull.dtype),
    )
