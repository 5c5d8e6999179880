"""Made bundle-v1 and expected.json beside it. Run only to add the golden bundle of a new format version.

A golden bundle stays as it was written: it stands for the files users have. To change the format, raise
`equipot.model.card.BUNDLE_VERSION`, add an upgrade to `equipot.model.upgrades`, copy this script to
make_bundle_v2.py and keep this one and its bundle.
"""

import json
from pathlib import Path

import numpy as np
import torch

from equipot.model.batch import System, build_graph, collate
from equipot.model.bundle import load_potential, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.potential import Potential
from equipot.model.references import References

HERE = Path(__file__).parent
BUNDLE = HERE / "bundle-v1"


def systems() -> list[System]:
    """Water, and two atoms in a small skewed cell."""
    water = System(
        atomic_numbers=np.array([8, 1, 1]),
        positions=np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.03, -0.76, -0.47]]),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, dtype=bool),
    )
    crystal = System(
        atomic_numbers=np.array([1, 8]),
        positions=np.array([[0.1, 0.2, 0.3], [1.4, 1.1, 1.0]]),
        cell=np.array([[2.9, 0.0, 0.0], [1.1, 2.7, 0.0], [-0.4, 0.6, 2.8]]),
        pbc=np.ones(3, dtype=bool),
        level_of_theory=1,
    )
    return [water, crystal]


def main() -> None:
    """Writes the bundle and what it predicts, at float64."""
    config = ModelConfig(
        width=8,
        layers=2,
        cutoff=3.5,
        radial=5,
        elements=(1, 8),
        levels_of_theory=("PBE", "wB97X/6-31G(d)"),
        mean_neighbors=10.0,
    )
    references = References(energy=np.array([[-13.6, -2041.8], [-16.4, -2043.9]]), scale=np.array([1.5, 0.7]))
    torch.manual_seed(1)
    model = Potential(config, references)
    with torch.no_grad():
        model.energy_head.down.weight.mul_(10.0)
    write_bundle(
        BUNDLE,
        name="golden",
        config=config,
        references=references,
        tensors=model.state_dict().items(),
        provenance={"data": [{"name": "none", "digest": "sha256:0"}], "note": "random weights"},
        metrics={"test": {"force_mae": 0.5}},
        max_shard_bytes=2048,
    )
    loaded, _ = load_potential(BUNDLE, dtype=torch.float64)
    batch = collate([build_graph(system, config.cutoff) for system in systems()], dtype=torch.float64)
    out = loaded(batch, stress=True)
    expected = {
        "energy": out.energy.tolist(),
        "forces": out.forces.tolist(),
        "crystal_stress": out.stress[1].tolist(),
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
