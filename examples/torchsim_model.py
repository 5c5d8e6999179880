"""TorchSim with an equipot server as its model: `pip install torch-sim-atomistic 'equipot[ase]'`.

    python examples/torchsim_model.py localhost:50051 [--steps 200] [--fmax 0.05] [--out FILE] [STRUCTURES]

STRUCTURES is any file that ASE reads; all its frames are relaxed together by TorchSim's FIRE, each step
one batch for the server. Without one they are five shaken ethanol molecules. `EquipotModel` goes wherever
TorchSim takes a model: its integrators, its autobatchers, its reporters.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from torch_sim.models.interface import ModelInterface
from torch_sim.optimizers import fire

from equipot.client import Client, ClientError, StructureArrays


class EquipotModel(ModelInterface):  # type: ignore[misc]  # TorchSim's types are not seen here
    """A served bundle, and that one as long as this object lives, whatever is deployed meanwhile.

    Args:
        client: of the server; its model.
        stress: whether stress is wanted at every step: for cells that move.
        device: where TorchSim computes.
        dtype: of what TorchSim computes with; what travels is float64.
    """

    def __init__(
        self,
        client: Client,
        *,
        stress: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        info = client.model()
        self._client = client
        self._name = f"{info.name}@{info.digest}"
        self._device, self._dtype = torch.device(device), dtype
        self._compute_stress, self._compute_forces = stress, True

    def forward(
        self, state: ts.SimState | dict[str, torch.Tensor], **words: object
    ) -> dict[str, torch.Tensor]:
        """Energy (S,) in eV, forces (N, 3) in eV/Å and, if wanted, stress (S, 3, 3) in eV/Å³.

        Raises:
            StructureFailure: one of the structures cannot be answered; no number stands for it.
        """
        if isinstance(state, dict):
            state = ts.SimState(**state, masses=torch.ones_like(state["positions"][:, 0]))
        counts = torch.bincount(state.system_idx, minlength=state.n_systems)
        # TorchSim keeps lattice vectors in columns; structure after structure it is as on the wire.
        cell = state.cell.transpose(1, 2).detach().cpu().numpy().astype(np.float64)
        answer = self._client.predict(
            StructureArrays(
                n_atoms=counts.cpu().numpy().astype(np.int64),
                atomic_numbers=state.atomic_numbers.cpu().numpy().astype(np.int32),
                positions=state.positions.detach().cpu().numpy().astype(np.float64),
                cell=cell,
                pbc=np.broadcast_to(np.asarray(state.pbc, dtype=np.bool_), (len(counts), 3)).copy(),
                charge=np.zeros(len(counts), dtype=np.int32),
                spin_multiplicity=np.zeros(len(counts), dtype=np.int32),
            ),
            stress=self._compute_stress,
            model=self._name,
        )
        answer.raise_for_failures()
        found = {"energy": answer.energy, "forces": answer.forces, "stress": answer.stress}
        return {
            name: torch.as_tensor(array, dtype=self._dtype, device=self._device)
            for name, array in found.items()
            if array is not None
        }


def shaken() -> list[Atoms]:
    """Five molecules that are not at rest, in boxes that touch nothing."""
    frames = []
    for seed in range(5):
        atoms = molecule("CH3CH2OH", vacuum=6.0)
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    return frames


def main() -> int:
    """Relaxes all frames together and says where they came to rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structures", nargs="?")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fmax", type=float, default=0.05)
    parser.add_argument("--out", help="file for the relaxed structures")
    words = parser.parse_args()
    frames = read(words.structures, ":") if words.structures else shaken()
    try:
        with Client(words.address) as client:
            model = EquipotModel(client)
            state = ts.optimize(
                frames,
                model,
                optimizer=fire,
                convergence_fn=ts.generate_force_convergence_fn(words.fmax, include_cell_forces=False),
                max_steps=words.steps,
            )
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for place, energy in enumerate(state.energy.tolist()):
        forces = state.forces[state.system_idx == place]
        print(f"structure {place}: {energy:.6f} eV, largest force {forces.norm(dim=1).max():.4f} eV/Å")
    if words.out:
        write(words.out, ts.io.state_to_atoms(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
