"""Made bundle-v2 and expected-v2.json beside it: two members, a calibration and a domain. See make_bundle_v1.

A golden bundle stays as it was written. To change the format, raise `equipot.model.card.BUNDLE_VERSION`, add
an upgrade to `equipot.model.upgrades`, copy this script to make_bundle_v3.py, keep this one and its bundle.
"""

import json
from pathlib import Path

import numpy as np
import torch

from equipot.model.batch import System, build_graph, build_graphs, collate
from equipot.model.bundle import load_potential, load_uncertainty, member_prefix, read_card, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.conformal import Calibration, LevelCalibration, quantiles_of
from equipot.model.domain import Neighborhoods
from equipot.model.ensemble import Ensemble
from equipot.model.inference import FrozenPotential
from equipot.model.potential import Potential
from equipot.model.references import References
from equipot.model.uncertainty import DomainFacts, Uncertainty
from equipot.train.uncertainty.domain_fit import DomainFit

HERE = Path(__file__).parent
BUNDLE = HERE / "bundle-v2"
EXPECTED = "expected-v2.json"


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


def make_uncertainty(config: ModelConfig) -> Uncertainty:
    """Of made-up errors, and of water that has moved a little."""
    rng = np.random.default_rng(2)
    fit = DomainFit(config.elements, config.cutoff)
    water = systems()[0]
    moved = [
        System(water.atomic_numbers, water.positions + rng.normal(0, 0.05, (3, 3)), water.cell, water.pbc)
        for _ in range(50)
    ]
    fit.add(collate(build_graphs(moved, config.cutoff), dtype=torch.float64))
    errors = np.abs(rng.normal(0, 0.01, 40))
    level = LevelCalibration(quantiles_of(errors, 0.5 * errors + 0.005, np.arange(40)), None)
    return Uncertainty(
        members=2,
        calibration=Calibration("sha256:0", 40, 40, {"PBE": level}),
        domain=fit.finish(),
        facts=DomainFacts(mix="sha256:0", structures=50, atoms=150, calibrated_on=40, inside=0.99),
    )


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
    tensors: dict[str, torch.Tensor] = {}
    for member in range(2):
        torch.manual_seed(1 + member)
        model = Potential(config, references)
        with torch.no_grad():
            model.energy_head.down.weight.mul_(10.0)
        tensors |= {member_prefix(member) + name: value for name, value in model.state_dict().items()}
    write_bundle(
        BUNDLE,
        name="golden",
        config=config,
        references=references,
        tensors=tensors.items(),
        provenance={"data": [{"name": "none", "digest": "sha256:0"}], "note": "random weights"},
        metrics={"test": {"force_mae": 0.5}},
        max_shard_bytes=8192,
        uncertainty=make_uncertainty(config),
    )
    expected = predictions(BUNDLE, torch.float64)
    (HERE / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def predictions(bundle: Path, dtype: torch.dtype) -> dict[str, object]:
    """What the ensemble says of the systems."""
    card = read_card(bundle)
    members = [load_potential(bundle, dtype=dtype, member=k)[0] for k in range(card.members)]
    batch = collate([build_graph(system, card.config.cutoff) for system in systems()], dtype=dtype)
    out, spread = Ensemble([FrozenPotential(one) for one in members])(batch, stress=True)
    assert spread is not None
    assert spread.forces is not None
    assert out.forces is not None
    assert out.stress is not None
    known = load_uncertainty(bundle, card)
    assert known.domain is not None
    assert known.calibration is not None
    quantiles = known.calibration.by_level_of_theory["PBE"].energy
    assert quantiles is not None
    return {
        "energy": out.energy.tolist(),
        "forces": out.forces.tolist(),
        "crystal_stress": out.stress[1].tolist(),
        "energy_spread": spread.energy.tolist(),
        "forces_spread": spread.forces.tolist(),
        "water_interval": float(quantiles.half_width(spread.energy.numpy()[:1] / 3, 0.9)[0]),
        "scores": [verdict.score for verdict in known.domain(Neighborhoods.of(batch, card.config.elements))],
    }


if __name__ == "__main__":
    main()
