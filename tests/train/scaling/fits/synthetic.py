"""A study's directory made of known laws and noise: what a runner would have left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = {"molecules": 0.8, "crystals": 1.3}
BASE = {
    "architecture": "egnn",
    "layers": 3,
    "forces": "conservative",
    "residual": True,
    "normalisation": "layer",
    "inputs": "invariant",
    "references": "per-level",
    "data_fraction": 1.0,
    "structures_per_step": 8,
}
TRAIN, BATCH = 2000, 8


def parameters_of(width: int, layers: int) -> int:
    return layers * (6 * width**2 + 20 * width) + 100


def flops_of(width: int, layers: int) -> float:
    """Of a structure."""
    return layers * (900.0 * width**2 + 4000.0 * width)


@dataclass
class Truth:
    """L = E + A·N^−α + B·S^−β + G·D^−γ in parameters, structures seen and training structures."""

    offset: float = 0.01
    a: float = 3.0
    alpha: float = 0.5
    b: float = 4.0
    beta: float = 0.6
    g: float = 0.6
    gamma: float = 0.45
    noise: float = 0.015
    factors: dict[tuple[str, Any], float] = field(
        default_factory=lambda: {
            ("forces", "direct"): 1.10,
            ("forces", "invariant"): 1.8,
            ("inputs", "raw"): 1.4,
            ("references", "shared"): 1.3,
            ("residual", False): 1.25,
            ("normalisation", "none"): 1.0,
            ("architecture", "fast-egnn"): 0.85,
            ("architecture", "transformer"): 1.15,
            ("architecture", "gcn"): 2.0,
            ("architecture", "gat"): 1.6,
        }
    )

    def loss(self, parameters: float, seen: float, data: float) -> float:
        return float(
            self.offset
            + self.a * parameters**-self.alpha
            + self.b * seen**-self.beta
            + self.g * data**-self.gamma
        )


class Synthetic:
    """Writes points."""

    def __init__(self, path: Path, truth: Truth | None = None, seed: int = 0) -> None:
        self.path = path
        self.truth = truth or Truth()
        self._random = np.random.default_rng(seed)
        (path / "points").mkdir(parents=True, exist_ok=True)

    def point(self, group: str, width: int, *, steps: int, seed: int = 0, **changes: Any) -> str:
        holdout, data = changes.pop("holdout", False), changes.get("data_fraction", 1.0)
        point = {**BASE, "group": [group], "width": width, "seed": seed, "steps": steps, **changes}
        layers, structures = int(point["layers"]), round(TRAIN * data)
        words = [f"{key}-{value}" for key, value in sorted(changes.items())]
        name = "_".join([group, f"w{width}", f"n{steps}", *words, f"s{seed}"])
        parameters, seen = parameters_of(width, layers), steps * BATCH
        loss = self.truth.loss(parameters, seen, structures)
        for (key, value), factor in self.truth.factors.items():
            loss *= factor if point[key] == value else 1.0
        shallow = point["residual"] is False
        loss *= 1 + 0.1 * max(0, layers - 4) if shallow else 1.0
        loss *= float(np.exp(self._random.normal(scale=self.truth.noise)))
        flops = flops_of(width, layers) * seen
        point |= {
            "name": name,
            "train_structures": structures,
            "holdout": holdout,
            "target_flops": flops,
            "learning_rate": 1e-3,
            "overrides": {},
        }
        folder = self.path / "points" / name
        folder.mkdir(parents=True)
        (folder / "point.json").write_text(json.dumps(point))
        self._curve(folder, loss, steps, flops)
        result = {
            "point": point,
            "parameters": parameters,
            "parameters_without_embedding": parameters - 100,
            "flops": flops,
            "steps": steps,
            "structures": seen,
            "atoms": seen * 10,
            "edges": seen * 150,
            "epochs": seen / structures,
            "seconds": flops / 1e10,
            "stopped": "finished",
            "train_loss": loss * 0.9,
            "validation_loss": loss,
            "test": self._errors(loss)
            | {
                "by_source": {name: self._errors(loss * factor) for name, factor in SOURCES.items()},
                "by_element": {
                    symbol: {"force_mae": 2 * loss * k, "zero_forces_mae": 0.8 * k, "n_atoms": 100}
                    for symbol, k in (("H", 0.5), ("C", 1.0), ("O", 1.4), ("Si", 2.0))
                },
            },
            "unseen": {"aspirin": self._errors(loss * 2) | {"unsupported": 0, "structures_in_store": 50}},
            "baselines": {
                "zero_forces": {"force_mae": 0.9, "force_rmse": 1.2, "by_source": {}},
                "references": {"loss": 8.0, "energy_mae_per_atom": 0.2, "energy_rmse_per_atom": 0.3},
                "mean": {"loss": 9.0, "energy_mae_per_atom": 1.5, "energy_rmse_per_atom": 2.0},
            },
            "similarity": [0.1 + (0.85 if shallow else 0.3) * k / (layers + 1) for k in range(layers + 1)],
            "peak_memory_bytes": 5 * 10**8 + 40 * parameters,
            "host_load": 1.0,
        }
        (folder / "result.json").write_text(json.dumps(result))
        self._parity(folder, loss)
        return name

    def whole(self, seeds: int = 3) -> None:
        """All experiments, small."""
        widths = (8, 16, 32, 64, 128, 192)
        for seed in range(seeds):
            for width in widths:
                self.point("size", width, steps=1000, seed=seed)
            for fraction in (0.04, 0.08, 0.16, 0.32, 0.64):
                self.point("data", 64, steps=1000, seed=seed, data_fraction=fraction)
                self.point("epochs", 64, steps=round(1000 * fraction), seed=seed, data_fraction=fraction)
            for layers, width in ((2, 78), (6, 45), (8, 39), (12, 32)):
                self.point("depth", width, steps=1000, seed=seed, layers=layers)
                self.point("depth", width, steps=1000, seed=seed, layers=layers, residual=False)
            for key, value in self.truth.factors:
                if key == "architecture":
                    self.point("architectures", 64, steps=1000, seed=seed, architecture=value)
                else:
                    for width in widths[:5]:
                        self.point("confounds", width, steps=1000, seed=seed, **{key: value})
            self.point("better", 64, steps=250, seed=seed, architecture="fast-egnn")
            for budget in (1e10, 4e10, 1.6e11):
                for width in (12, 24, 48, 96):
                    steps = round(budget / flops_of(width, 3) / BATCH)
                    self.point("compute", width, steps=steps, seed=seed)
        self.point("size", 256, steps=1000, holdout=True)
        self.point("data", 64, steps=1000, seed=8, data_fraction=0.9, holdout=True)

    def _errors(self, loss: float) -> dict[str, float]:
        return {
            "loss": loss,
            "energy_mae_per_atom": 0.05 * loss,
            "energy_rmse_per_atom": 0.07 * loss,
            "force_mae": 0.4 * loss,
            "force_rmse": 0.6 * loss,
            "force_cosine": 1 / (1 + loss),
            "structures": 100,
        }

    def _curve(self, folder: Path, loss: float, steps: int, flops: float) -> None:
        lines = ["step,flops,structures,edges,atoms,train_loss,validation_loss,energy_mae_per_atom,force_mae"]
        for share in np.linspace(0.125, 1, 8):
            now = loss * (1 + 2 * (1 - share))
            step = max(1, round(steps * share))
            lines.append(f"{step},{flops * share:.6g},{step * BATCH},0,0,{now},{now},{now / 20},{now / 3}")
        (folder / "curve.csv").write_text("\n".join(lines) + "\n")

    def _parity(self, folder: Path, loss: float) -> None:
        arrays = {}
        for name, factor in SOURCES.items():
            for label, scale in (("energy", 0.3), ("forces", 1.0)):
                truth = self._random.normal(scale=scale, size=300)
                said = truth + self._random.normal(scale=0.3 * scale * loss * factor, size=300)
                arrays[f"{name}/{label}"] = np.stack([truth, said], axis=1).astype(np.float32)
        np.savez_compressed(folder / "parity.npz", allow_pickle=False, **arrays)
