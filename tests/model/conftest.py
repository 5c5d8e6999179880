"""Structures and models for the model's tests."""

from collections.abc import Callable

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from equipot.model.batch import Graph, System, build_graph
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References

CUTOFF = 3.5
ELEMENTS = (1, 6, 8, 13, 29)
LEVELS = ("PBE", "wB97X/6-31G(d)")

MakeModel = Callable[..., Potential]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_system() -> Callable[..., System]:
    def make(atoms: Atoms, **fields: int) -> System:
        return System(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, **fields)

    return make


@pytest.fixture(scope="session")
def structures(make_system: Callable[..., System]) -> dict[str, list[Graph]]:
    """Rattled molecules, crystals (small, skewed, a slab and a chain), and all in one batch."""
    rng = np.random.default_rng(7)

    def rattled(atoms: Atoms, **fields: int) -> Graph:
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        return build_graph(make_system(atoms, **fields), CUTOFF)

    slab = ase.build.fcc111("Al", size=(1, 1, 3), vacuum=6.0)
    slab.pbc = (True, True, False)
    skewed = Atoms(
        "CO", [(0.1, 0.2, 0.3), (1.2, 0.9, 1.0)], cell=[(2.6, 0, 0), (2.2, 2.1, 0), (-1.9, 0.8, 2.4)]
    )
    skewed.pbc = True
    chain = Atoms("CHH", [(0, 0, 0), (0, 0.95, 0.3), (0.1, -0.5, -0.8)], cell=[1.9, 0, 0], pbc=(1, 0, 0))
    molecules = [
        rattled(ase.build.molecule("CH3CH2OH")),
        rattled(ase.build.molecule("H2O"), level_of_theory=1),
        rattled(ase.build.molecule("CH4"), level_of_theory=1),
    ]
    crystals = [
        rattled(ase.build.bulk("Cu")),
        rattled(ase.build.bulk("Al", cubic=True), level_of_theory=1),
        rattled(skewed),
    ]
    mixed = [molecules[1], crystals[2], rattled(slab), molecules[0], rattled(chain, level_of_theory=1)]
    return {"molecules": molecules, "crystals": crystals, "mixed": mixed}


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Small models in eval mode, with weights so large that nothing hides below a tolerance."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: object) -> Potential:
        config = ModelConfig.from_json(
            {
                "width": 16,
                "layers": 2,
                "cutoff": CUTOFF,
                "radial": 6,
                "elements": ELEMENTS,
                "levels_of_theory": LEVELS,
                "mean_neighbors": 12.0,
            }
            | fields
        )
        rng = np.random.default_rng(3)
        shape = (len(config.levels_of_theory), len(config.elements))
        references = References(energy=-100.0 * rng.random(shape), scale=1.0 + rng.random(shape[0]))
        torch.manual_seed(seed)
        model = Potential(config, references).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "head.down" in name:
                    parameter.mul_(10.0)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
        return model.eval()

    return make
