"""Bundles written by earlier releases load and predict what they did; the format does not drift unseen."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from equipot.model.batch import build_graph, collate
from equipot.model.bundle import load_potential
from equipot.model.card import BUNDLE_VERSION
from equipot.model.upgrades import UPGRADES

GOLDEN = Path(__file__).parents[1] / "golden"
WHAT_TO_DO = (
    "The format of bundles has changed. If that is meant: raise equipot.model.card.BUNDLE_VERSION, add to "
    "equipot.model.upgrades.UPGRADES the function that brings the previous version up, add a golden bundle "
    "of the new version beside the old ones, and compare with that one here. If not: undo the change."
)


def load_maker(version: int) -> ModuleType:
    name = f"make_bundle_v{version}"
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """Of the present version."""
    return load_maker(BUNDLE_VERSION)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_ensemble_predicts_as_ever(dtype: torch.dtype, rtol: float) -> None:
    found = load_maker(2).predictions(GOLDEN / "bundle-v2", dtype)
    expected = json.loads((GOLDEN / "expected-v2.json").read_text())
    assert found.keys() == expected.keys()
    # A spread is a difference: it is as exact as what it is a difference of.
    absolute = {"energy_spread": 1e-3 * rtol * 2000, "forces_spread": rtol, "water_interval": rtol}
    for name, values in expected.items():
        size = float(np.abs(values).max())
        atol = absolute.get(name, rtol * size)
        np.testing.assert_allclose(found[name], values, rtol=10 * rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_bundle_predicts_as_ever(dtype: torch.dtype, rtol: float) -> None:
    maker = load_maker(1)
    model, card = load_potential(GOLDEN / "bundle-v1", dtype=dtype)
    batch = collate([build_graph(system, card.config.cutoff) for system in maker.systems()], dtype=dtype)
    out = model(batch, stress=True)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    np.testing.assert_allclose(out.energy.numpy(), expected["energy"], rtol=rtol)
    size = float(np.abs(expected["forces"]).max())
    np.testing.assert_allclose(out.forces.numpy(), expected["forces"], rtol=rtol, atol=rtol * size)
    size = float(np.abs(expected["crystal_stress"]).max())
    np.testing.assert_allclose(out.stress[1].numpy(), expected["crystal_stress"], rtol=rtol, atol=rtol * size)


def keys_of(value: object) -> object:
    """The nested keys of a card, without what users put into it."""
    if isinstance(value, dict):
        return {key: keys_of(v) for key, v in value.items() if key not in ("provenance", "metrics")}
    return [keys_of(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_the_cards_keys_do_not_drift(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "HERE", tmp_path)
    monkeypatch.setattr(maker, "BUNDLE", tmp_path / "now")
    maker.main()
    golden = json.loads((GOLDEN / f"bundle-v{BUNDLE_VERSION}" / "model.json").read_text())
    now = json.loads((tmp_path / "now" / "model.json").read_text())
    assert keys_of(now) == keys_of(golden), WHAT_TO_DO
    names, now_names = (
        sorted(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"])
        for path in (GOLDEN / f"bundle-v{BUNDLE_VERSION}", tmp_path / "now")
    )
    assert names == now_names, WHAT_TO_DO


def test_every_version_has_its_upgrade_and_its_golden_bundle() -> None:
    assert sorted(UPGRADES) == list(range(1, BUNDLE_VERSION)), WHAT_TO_DO
    for version in range(1, BUNDLE_VERSION + 1):
        assert (GOLDEN / f"bundle-v{version}" / "model.json").is_file(), WHAT_TO_DO


def test_golden_bundle_is_small() -> None:
    for version in range(1, BUNDLE_VERSION + 1):
        size = sum(file.stat().st_size for file in (GOLDEN / f"bundle-v{version}").iterdir())
        assert size < 50_000
