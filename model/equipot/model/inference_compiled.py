"""One call of compiled code per batch: weights packed once, and the batch's arrays by their addresses.

The records mirror inference_kernels.h, name by name. Results have the same bits in any batch and with any
number of threads; inference_kernels.cpp says how. The call holds no interpreter lock.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from equipot.model.batch import SystemBatch
from equipot.model.egnn import EGNN, EGNNLayer
from equipot.model.heads import ForceHead
from equipot.model.potential import Potential

BLOCK_EDGES = 126
"""Edges in a block: 9 times the rows that a product takes at once on AVX-512, 21 times those on AVX2."""

WORKSPACE_KEPT = 256 * 2**20
"""Bytes; a larger workspace is given back to the system after its call."""

_Simple = ctypes.c_int64 | ctypes.c_double | ctypes.c_void_p
_INT64, _DOUBLE, _ADDRESS = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


class _Record(ctypes.Structure):
    """A record of inference_kernels.h, filled by name from numbers, tensors and other records."""

    def __init__(self, **values: object) -> None:
        assert {name for name, *_ in self._fields_} == set(values)
        self._alive = values
        super().__init__(**{name: _plain(value) for name, value in values.items()})


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return value.ctypes.data
    if isinstance(value, ctypes.Array | ctypes.Structure):
        return ctypes.addressof(value)
    return value


def _fields(kind: type[_Simple], names: str) -> list[tuple[str, type[_Simple]]]:
    return [(name, kind) for name in names.split()]


class _Layer(_Record):
    _fields_ = _fields(
        _ADDRESS,
        "norm_weight norm_bias receiver_t receiver receiver_bias sender_t sender radial_t radial "
        "message_t message message_bias own_t own own_bias gathered_t gathered down_t down down_bias",
    )


class _Heads(_Record):
    _fields_ = _fields(
        _ADDRESS,
        "norm_weight norm_bias up_t up up_bias energies receiver_t receiver_bias sender_t radial_t strengths",
    )


class _Model(_Record):
    _fields_ = (
        _fields(_INT64, "width hidden radials layers residual n_levels n_elements")
        + _fields(_DOUBLE, "cutoff message_scale norm_eps")
        + _fields(_ADDRESS, "layer heads reference scale")
    )


class _Systems(_Record):
    _fields_ = _fields(_INT64, "n_systems n_atoms n_edges n_rows") + _fields(
        _ADDRESS,
        "positions cell shifts senders receivers system_idx level_idx element_idx row embedded",
    )


class _Wanted(_Record):
    _fields_ = _fields(_INT64, "forces virial keep block_edges threads")


class _Out(_Record):
    _fields_ = _fields(_ADDRESS, "energy forces virial")


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What the compiled code says of a batch, in float64."""

    energy: NDArray[np.float64]
    """(S,) eV"""
    forces: NDArray[np.float64] | None
    """(N, 3) eV/Å"""
    virial: NDArray[np.float64] | None
    """(S, 3, 3) eV, Σ_e r_e ⊗ ∂E/∂r_e, not symmetrised"""


class CompiledPotential:
    """A potential's weights as compiled code reads them: a snapshot, twice the size of the weights."""

    def __init__(self, potential: Potential, library: str) -> None:
        """Packs the weights.

        Args:
            potential: an EGNN on the CPU in float32 or float64, whose weights will not change any more.
            library: path of the compiled library.
        """
        backbone, self._embedding = potential.backbone, potential.embedding
        assert isinstance(backbone, EGNN)
        self._dtype = potential.embedding.element.weight.dtype
        calls, suffix = ctypes.CDLL(library), _SUFFIX[self._dtype]
        self._infer: Callable[..., int] = getattr(calls, f"equipot_infer_{suffix}")
        self._infer.restype = _INT64
        self._panel = int(getattr(calls, f"equipot_panel_{suffix}")())
        self._rows: list[Tensor] = []
        config = potential.config
        layers = [self._layer(layer) for layer in backbone.layers]
        with torch.no_grad():
            self._table = potential.embedding.element.weight.detach().clone()
        varied = self._embedding.charge is not None or self._embedding.spin is not None
        self._table_rows = None if varied else len(self._table)
        self._model = _Model(
            width=config.width,
            hidden=potential.energy_head.up.out_features,
            radials=config.radial,
            layers=config.layers,
            residual=int(config.residual),
            n_levels=len(config.levels_of_theory),
            n_elements=len(config.elements),
            cutoff=config.cutoff,
            message_scale=config.mean_neighbors**-0.5,
            norm_eps=backbone.norm.eps if isinstance(backbone.norm, nn.LayerNorm) else 0.0,
            layer=(_Layer * len(layers))(*layers),
            heads=self._heads(potential),
            reference=torch.tensor(potential.references.energy),
            scale=torch.tensor(potential.references.scale),
        )
        self._layers = layers
        self._spare: list[Tensor] = []

    def __call__(
        self, batch: SystemBatch, *, forces: bool, virial: bool, keep_bytes: int, threads: int
    ) -> Sums:
        """Computes a batch; several threads may call at once.

        Args:
            batch: on the CPU, in any floating-point dtype; float64 positions are used to their last bit.
            forces: whether forces are wanted.
            virial: whether virials are; of a model with direct forces there are none.
            keep_bytes: most memory for what a layer's way back would otherwise compute again.
            threads: how many compute; the results do not depend on it.
        """
        with torch.no_grad():
            element_idx = self._embedding.elements(batch.atomic_numbers)
            if (n := int(element_idx.min())) < 0:
                raise IndexError(f"{n}: the batch holds an element that the model does not know")
            if self._table_rows is not None and self._table_rows <= batch.n_atoms:
                embedded, row = self._table, element_idx
            else:
                embedded, row = self._embedding(batch, element_idx), torch.arange(batch.n_atoms)
        systems = _Systems(
            n_systems=batch.n_systems,
            n_atoms=batch.n_atoms,
            n_edges=batch.n_edges,
            n_rows=len(embedded),
            positions=_doubles(batch.positions),
            cell=_doubles(batch.cell),
            shifts=_doubles(batch.cell_shifts),
            senders=batch.senders.contiguous(),
            receivers=batch.receivers.contiguous(),
            system_idx=batch.system_idx.contiguous(),
            level_idx=batch.level_idx.contiguous(),
            element_idx=element_idx.contiguous(),
            row=row,
            embedded=embedded.contiguous(),
        )
        sums = Sums(
            np.empty(batch.n_systems),
            np.empty((batch.n_atoms, 3)) if forces else None,
            np.empty((batch.n_systems, 3, 3)) if virial else None,
        )
        edge_bytes = batch.n_edges * self._model.width * self._model.layers * self._dtype.itemsize
        wanted = _Wanted(
            forces=forces,
            virial=virial,
            keep=edge_bytes <= keep_bytes,
            block_edges=BLOCK_EDGES,
            threads=threads,
        )
        self._run(systems, wanted, _Out(energy=sums.energy, forces=sums.forces, virial=sums.virial))
        return sums

    def _run(self, systems: _Systems, wanted: _Wanted, out: _Out) -> None:
        records = [ctypes.byref(record) for record in (self._model, systems, wanted, out)]
        size = self._infer(*records, None)
        # Taken out of the list while in use, so that each thread that calls has its own.
        workspace = self._spare.pop() if self._spare else None
        if workspace is None or workspace.numel() < size:
            # torch aligns to 64 bytes, as the kernels need.
            workspace = torch.empty(size, dtype=torch.uint8)
        self._infer(*records, _ADDRESS(workspace.data_ptr()))
        if size <= WORKSPACE_KEPT:
            self._spare.append(workspace)

    def _layer(self, layer: nn.Module) -> _Layer:
        assert isinstance(layer, EGNNLayer)
        up, down = layer.messages.up, layer.messages.down
        return _Layer(
            **self._norm(layer.norm),
            **self._both("receiver", up.receiver),
            receiver_bias=self._padded(up.receiver.bias),
            **self._both("sender", up.sender),
            **self._both("radial", up.radial),
            **self._both("message", down),
            message_bias=self._padded(down.bias),
            **self._both("own", layer.own),
            own_bias=self._padded(layer.own.bias),
            **self._both("gathered", layer.gathered),
            **self._both("down", layer.down),
            down_bias=self._padded(layer.down.bias),
        )

    def _heads(self, potential: Potential) -> _Heads:
        energy, force = potential.energy_head, potential.force_head
        assert force is None or isinstance(force, ForceHead)
        return _Heads(
            **self._norm(potential.backbone.norm),
            **self._both("up", energy.up),
            up_bias=self._padded(energy.up.bias),
            energies=self._padded(energy.down.weight),
            receiver_t=None if force is None else self._packed(force.up.receiver.weight.t()),
            receiver_bias=None if force is None else self._padded(force.up.receiver.bias),
            sender_t=None if force is None else self._packed(force.up.sender.weight.t()),
            radial_t=None if force is None else self._packed(force.up.radial.weight.t()),
            strengths=None if force is None else self._padded(force.down.weight),
        )

    def _norm(self, norm: nn.Module | Tensor) -> dict[str, Tensor | None]:
        if not isinstance(norm, nn.LayerNorm):
            return {"norm_weight": None, "norm_bias": None}
        return {"norm_weight": self._padded(norm.weight), "norm_bias": self._padded(norm.bias)}

    def _both(self, name: str, linear: nn.Linear) -> dict[str, Tensor]:
        return {name: self._packed(linear.weight), f"{name}_t": self._packed(linear.weight.t())}

    def _packed(self, weight: Tensor) -> Tensor:
        """(panels, inner, panel) from (inner, columns); columns beyond the weight's are zero."""
        columns = self._padded(weight)
        return columns.view(len(weight), -1, self._panel).transpose(0, 1).contiguous()

    def _padded(self, values: Tensor) -> Tensor:
        """Whole panels in the last dimension, filled with zeros."""
        missing = -values.shape[-1] % self._panel
        return nn.functional.pad(values.detach(), (0, missing)).contiguous()


def packed_bytes(potential: Potential) -> int:
    """Bytes that packed weights will take, about."""
    return 2 * sum(parameter.numel() * parameter.element_size() for parameter in potential.parameters())


def _doubles(tensor: Tensor) -> Tensor:
    return tensor.detach().double().contiguous()
