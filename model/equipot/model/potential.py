"""Energy, forces and stress of a batch of structures. Knows nothing of files, training or serving."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from equipot.model.backbone import Backbone
from equipot.model.batch import SystemBatch
from equipot.model.config import ModelConfig
from equipot.model.duals import dual, parts_of
from equipot.model.egnn import EGNN
from equipot.model.errors import ModelError
from equipot.model.geometry import (
    Edges,
    edge_lengths,
    make_edges,
    pull_of_directions,
    pull_of_lengths,
    sum_by_index,
)
from equipot.model.heads import Embedding, EnergyHead
from equipot.model.messages import BLOCKED_FORMS
from equipot.model.moments import MomentsBackbone
from equipot.model.references import References

T = TypeVar("T")

# What a config's words stand for. Training's controls are added by the study that has them.
BACKBONES: dict[str, type[Backbone]] = {"egnn": EGNN, "moments": MomentsBackbone}
EMBEDDINGS: dict[str, type[Embedding]] = {"invariant": Embedding}
FORCE_HEADS: dict[str, type[nn.Module]] = {}
"""Besides ``direct``, which is the backbone's own."""

# Small, not zero: an untrained model predicts almost its references, and every weight has a gradient at once.
_OUTPUT_GAIN = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a potential says of a batch."""

    energy: Tensor
    """(S,) float64, total, eV"""
    forces: Tensor | None
    """(N, 3) eV/Å in the batch's dtype, or None when not asked for"""
    stress: Tensor | None
    """(S, 3, 3) eV/Å³, positive in tension; NaN for systems not periodic in all three directions"""


class Potential(nn.Module):
    """A network of atomic energies on top of reference energies.

    The network runs in its parameters' dtype; distances and their expansion in the batch's; sums over
    neighbours in float32 or wider; sums over atoms in float64.
    """

    def __init__(self, config: ModelConfig, references: References) -> None:
        super().__init__()
        references.check_against(config)
        self.config = config
        self.references = references
        self._reference_tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.embedding = _known(EMBEDDINGS, "inputs", config.inputs)(config)
        self.backbone = _known(BACKBONES, "architecture", config.architecture)(config)
        self.energy_head = EnergyHead(config)
        self.force_head: nn.Module | None = None
        if config.forces != "conservative":
            heads = {"direct": self.backbone.force_head} | FORCE_HEADS
            self.force_head = _known(heads, "forces", config.forces)(config)
        if not self.energy_head.down.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws fresh weights from torch's global generator."""
        for name, values in self.draw_parameters(torch.default_generator):
            self.get_parameter(name).copy_(values)

    def draw_parameters(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Fresh weights by name, float32 on the CPU, one at a time: the model itself may be on meta.

        Normal of variance 1/fan-in, biases zero; what else a backbone has is drawn by its modules'
        ``reset_parameters``, and left out where they have none.
        """
        outputs = [self.energy_head.down] + ([self.force_head.down] if self.force_head else [])
        for path, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.Linear):
                gain = _OUTPUT_GAIN if module in outputs else 1.0
                weight = torch.empty(module.weight.shape, device="cpu")
                yield (
                    f"{path}.weight",
                    weight.normal_(std=gain * module.in_features**-0.5, generator=generator),
                )
                if module.bias is not None:
                    yield f"{path}.bias", torch.zeros(module.bias.shape, device="cpu")
            elif isinstance(module, nn.Embedding):
                weight = torch.empty(module.weight.shape, device="cpu")
                yield f"{path}.weight", weight.normal_(generator=generator)
            elif own and hasattr(module, "reset_parameters"):
                twin = copy.deepcopy(module).to_empty(device="cpu")
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
                    twin.reset_parameters()
                for name in own:
                    yield f"{path}.{name}", twin.get_parameter(name).detach()

    def forward(
        self, batch: SystemBatch, *, forces: bool = True, stress: bool = False, deterministic: bool = False
    ) -> Prediction:
        """Predicts total energies, and forces and stress where asked for.

        In training mode, and where gradients are enabled, everything can be back-propagated, conservative
        forces too. In eval mode the results are detached, and callers may be under ``no_grad`` or
        ``inference_mode``.

        Args:
            batch: structures that passed `validate`; unknown elements raise IndexError here.
            forces: whether to compute forces.
            stress: whether to compute stress.
            deterministic: evaluate every system alone, so that it gets the same bits whatever batch it is in,
                on the same machine with as many threads. A matrix product's rounding depends on its number
                of rows, so a common batch cannot promise that.

        Raises:
            ModelError: stress was asked of a model with direct forces; or torch.compile traces what it cannot
                compile: conservative forces in training, or messages in blocks.
        """
        if torch.compiler.is_compiling():
            self._check_compiling(by_gradient=stress or (forces and self.force_head is None))
        if stress and self.force_head is not None:
            raise no_stress()
        if deterministic:
            return join_predictions([self(one, forces=forces, stress=stress) for one in batch.alone()])
        by_gradient = stress or (forces and self.force_head is None)
        differentiable = self.training and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable or by_gradient):
            prediction = self._predict(_outside_inference_mode(batch), forces, stress, differentiable)
        return prediction if differentiable else _detached(prediction)

    def energy_and_pull(self, batch: SystemBatch) -> tuple[Tensor, Tensor]:
        """Energies (S,) float64 eV and ∂E/∂r (E, 3) eV/Å by the edge vectors; both detached.

        Forces and stress are linear in the pull: see :meth:`prediction_of`.
        """
        with torch.enable_grad():
            energy, pull = self._energy_and_pull(batch, batch.edge_vectors(), differentiable=False)
        return energy.detach(), pull

    def energy_along(self, batch: SystemBatch, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (S,) float64 eV, and the derivative () of their sum along a change of the edge vectors.

        The derivative is taken forwards (dual numbers), so that *one* backward pass gives the gradient of
        both by the parameters. Messages are evaluated in the split or plain form: the blocked ones have no
        forward derivative.

        Args:
            batch: structures that passed `validate`.
            direction: (E, 3) the change of the edge vectors.
        """
        with forward_ad.dual_level():
            vectors = dual(batch.edge_vectors().detach(), direction)
            edges, _ = self._edges(batch, vectors)
            energy, _ = self._energy_and_features(batch, replace(edges, blocked=None))
            values, slope = parts_of(energy)
            # Without any edge nothing depends on the vectors, and there is no slope.
            return values, values.new_zeros(()) if slope is None else slope.sum()

    def prediction_of(
        self, batch: SystemBatch, energy: Tensor, pull: Tensor, *, forces: bool, stress: bool
    ) -> Prediction:
        """What :meth:`energy_and_pull` means: a force is a difference of edge gradients.

        The energy depends on positions and cell through edge vectors alone, so one gradient gives both; the
        derivative by a symmetric strain is Σ_e r_e ⊗ ∂E/∂r_e.
        """
        force = None
        vectors = batch.edge_vectors()
        if forces:
            n = batch.n_atoms
            force = sum_by_index(pull, batch.receivers, n) - sum_by_index(pull, batch.senders, n)
            force = force.to(vectors.dtype)
        return Prediction(
            energy=energy, forces=force, stress=_stress(batch, vectors, pull) if stress else None
        )

    def _check_compiling(self, *, by_gradient: bool) -> None:
        if not self.backbone.compiles:
            _refuse_compiling(
                f"architecture = {self.config.architecture!r} cannot be compiled: it sorts edges by numbers "
                "that a trace does not have; use it uncompiled"
            )
        if self._in_blocks():
            _refuse_compiling(
                f"messages = {self.config.messages!r} cannot be compiled: it works by blocks of edges, with "
                "derivatives of its own; use messages = 'split' (the same weights)"
            )
        if by_gradient and self.training and torch.is_grad_enabled():
            _refuse_compiling(
                "the loss of conservative forces is a second derivative, which torch.compile does not have; "
                "train uncompiled (eval mode can be compiled), or with direct forces"
            )

    def _in_blocks(self) -> bool:
        return self.backbone.has_forms and any(form in BLOCKED_FORMS for form in self.config.message_forms)

    def _predict(self, batch: SystemBatch, forces: bool, stress: bool, differentiable: bool) -> Prediction:
        vectors = batch.edge_vectors()
        if stress or (forces and self.force_head is None):
            energy, pull = self._energy_and_pull(batch, vectors, differentiable=differentiable)
            return self.prediction_of(batch, energy, pull, forces=forces, stress=stress)
        edges, lengths = self._edges(batch, vectors)
        energy, h = self._energy_and_features(batch, edges)
        if not forces or self.force_head is None:
            return Prediction(energy=energy, forces=None, stress=None)
        _, scale = self.references_on(batch.positions.device)
        level = batch.level_idx[batch.system_idx]
        strengths = self.force_head(h, edges, vectors / lengths.unsqueeze(-1), level)
        scale_N1 = scale[level].unsqueeze(-1)
        return Prediction(energy=energy, forces=(strengths * scale_N1).to(vectors.dtype), stress=None)

    def _energy_and_pull(
        self, batch: SystemBatch, vectors: Tensor, *, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """Energies (S,), and ∂E/∂r (E, 3), which can be differentiated by parameters if so asked."""
        vectors = vectors.detach()
        edges, lengths = self._edges(batch, vectors)
        read = [edges.radial, edges.envelope] + ([] if edges.directions is None else [edges.directions])
        for tensor in read:
            tensor.requires_grad_()
        edges = replace(edges, pulled_once=differentiable)
        energy, _ = self._energy_and_features(batch, edges)
        by_radial, by_envelope, *by_directions = torch.autograd.grad(
            energy.sum(), read, create_graph=differentiable, materialize_grads=True
        )
        along = pull_of_lengths(lengths, self.config.cutoff, by_radial, by_envelope)
        pull = vectors * (along / lengths).unsqueeze(-1)
        for gradient in by_directions:
            pull = pull + pull_of_directions(vectors / lengths.unsqueeze(-1), lengths, gradient)
        return energy, pull

    def _energy_and_features(self, batch: SystemBatch, edges: Edges) -> tuple[Tensor, Tensor]:
        element_idx = self.embedding.elements(batch.atomic_numbers)
        h = self.embedding(batch, element_idx)
        h = self.backbone(h.to(torch.promote_types(h.dtype, torch.float32)), edges)
        return self.total_energy(batch, self.energy_head(h), element_idx), h

    def _edges(self, batch: SystemBatch, vectors: Tensor) -> tuple[Edges, Tensor]:
        lengths = edge_lengths(vectors)
        edges = make_edges(
            lengths,
            batch.senders,
            batch.receivers,
            n_atoms=batch.n_atoms,
            cutoff=self.config.cutoff,
            radial=self.config.radial,
            dtype=self.embedding.element.weight.dtype,
            blocked=self._in_blocks(),
            directions=vectors / lengths.unsqueeze(-1) if self.backbone.reads_directions else None,
        )
        return edges, lengths

    def total_energy(self, batch: SystemBatch, atomic_energies: Tensor, element_idx: Tensor) -> Tensor:
        """(S,) eV in float64, references added, from atomic energies (N, levels) in units of the scale."""
        energy_table, scale = self.references_on(atomic_energies.device)
        level_N = batch.level_idx[batch.system_idx]
        # float64: a sum over 1e5 atoms loses 1 meV in float32, and references alone are thousands of eV.
        atomic = atomic_energies.gather(-1, level_N.unsqueeze(-1)).squeeze(-1).double()
        atomic = atomic * scale[level_N] + energy_table[level_N, element_idx]
        return sum_by_index(atomic, batch.system_idx, batch.n_systems)

    def references_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Reference energies (levels, elements) and scales (levels,), float64, in eV."""
        if device not in self._reference_tensors:
            self._reference_tensors[device] = (
                torch.tensor(self.references.energy, device=device),
                torch.tensor(self.references.scale, device=device),
            )
        return self._reference_tensors[device]


def no_stress() -> ModelError:
    """Why a model with direct forces gives none."""
    return ModelError(
        "stress: this model has direct forces, which belong to no energy, so it has no stress; "
        "use a model with forces = 'conservative'"
    )


def _known(registry: Mapping[str, T], field: str, word: str) -> T:
    if word not in registry:
        raise ModelError(f"model config: {field} is {word!r}; choose one of {', '.join(registry)}")
    return registry[word]


# Raised within the trace, it would be taken for code that cannot be traced.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_compiling(reason: str) -> None:
    raise ModelError(f"torch.compile: {reason}")


def _stress(batch: SystemBatch, vectors: Tensor, pull: Tensor) -> Tensor:
    outer = vectors.detach().unsqueeze(-1) * pull.unsqueeze(-2)
    virial = sum_by_index(outer, batch.system_idx[batch.receivers], batch.n_systems)
    return stress_from_virial(batch, virial).to(vectors.dtype)


def stress_from_virial(batch: SystemBatch, virial: Tensor) -> Tensor:
    """(S, 3, 3) eV/Å³ from Σ_e r_e ⊗ ∂E/∂r_e (S, 3, 3) in eV; NaN where not periodic all around."""
    virial = 0.5 * (virial + virial.mT)
    volume = torch.linalg.det(batch.cell).abs()
    periodic = batch.pbc.all(-1)
    # A volume of 1 where there is none keeps the quotient and its derivative finite until NaN is put there.
    stress = virial / torch.where(periodic, volume, torch.ones_like(volume)).view(-1, 1, 1)
    return torch.where(periodic.view(-1, 1, 1), stress, torch.full_like(stress, math.nan))


def _outside_inference_mode(batch: SystemBatch) -> SystemBatch:
    # Autograd cannot save a tensor made under inference_mode; a copy made outside it is an ordinary tensor.
    if not batch.positions.is_inference():
        return batch
    return replace(batch, **{name: getattr(batch, name).clone() for name in batch.__slots__})


def _detached(prediction: Prediction) -> Prediction:
    return Prediction(
        energy=prediction.energy.detach(),
        forces=None if prediction.forces is None else prediction.forces.detach(),
        stress=None if prediction.stress is None else prediction.stress.detach(),
    )


def join_predictions(parts: list[Prediction]) -> Prediction:
    """Predictions of batches as that of their structures in one batch, in this order."""

    def join(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Prediction(
        energy=torch.cat([part.energy for part in parts]),
        forces=join([part.forces for part in parts]),
        stress=join([part.stress for part in parts]),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())
