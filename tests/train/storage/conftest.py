"""Stores of real data, in several shards and many chunks, and how two stores are compared."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from equipot.train import store_writer
from equipot.train.importer import ImportOptions, import_files
from equipot.train.sources.registry import RELEASES
from equipot.train.storage import base
from equipot.train.store import Store
from equipot.train.structures import NAMES

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Molecules, and where the shared data is, crystals with stress and moments and slabs with tags."""
    home = tmp_path_factory.mktemp("stores")
    molecules = ROOT / "examples" / "data" / "ethanol-methanol.extxyz"
    found = {"": [molecules]}
    for source, name in (("mptrj", "mptrj/MPtrj_2022.9_sample.json"), ("oc20", "oc20/relaxation_traj")):
        path = SHARED / name
        if path.exists():
            found[source] = sorted(path.glob("*.traj"))[:2] if path.is_dir() else [path]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_STRUCTURES", 150)
        for source, files in found.items():
            level = next(iter(RELEASES[source].levels.values())) if source else "PBE/def2-SVP"
            options = ImportOptions(level_of_theory=level, licence="MIT", name=source or "a", source=source)
            import_files(files, home / (source or "molecules"), options)
    return {source or "molecules": home / (source or "molecules") for source in found}


@pytest.fixture(params=["molecules", "mptrj", "oc20"])
def store(request: pytest.FixtureRequest, stores: dict[str, Path]) -> Path:
    if request.param not in stores:
        pytest.skip("shared data absent")
    return stores[request.param]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read in chunks is read in many of them."""
    monkeypatch.setattr(base, "CHUNK_STRUCTURES", 250)
    monkeypatch.setattr(base, "CHUNK_ATOMS", 3000)


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Store, Store], None]:
    """Fails unless every way of asking a store gives the same values and types to the last bit."""

    def same(left: object, right: object) -> None:
        a, b = np.asarray(left), np.asarray(right)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    def compare(one: Store, other: Store) -> None:
        assert len(one) == len(other)
        assert one.manifest == other.manifest
        n = len(one)
        drawn = np.random.default_rng(0).integers(0, n, 100)
        for wanted in (drawn, np.arange(n), np.array([n - 1, 0, 0, n - 1])):
            ours, theirs = one.read(wanted), other.read(wanted)
            for name in NAMES:
                same(getattr(ours, name), getattr(theirs, name))
        for i in [*drawn[:20].tolist(), *range(20), *range(n - 5, n)]:
            for what in ("system", "labels"):
                a, b = getattr(one, what)(i), getattr(other, what)(i)
                for name in a.__slots__:
                    same(getattr(a, name), getattr(b, name))
            assert one.origin(i) == other.origin(i)
            assert one.name(i) == other.name(i)
            for name in ("tags", "fixed", "magmoms"):
                same(one.extra(i, name), other.extra(i, name))
        for name in ("group", "cell", "pbc", "frame", "fingerprint", "name"):
            if name in ("group", "cell", "pbc", "frame") or name in one.manifest.columns:
                same(one.column(name), other.column(name))
                same(one.values(name, drawn), other.values(name, drawn))
        same(one.n_atoms, other.n_atoms)
        same(one.element_counts(drawn), other.element_counts(drawn))
        for a, b in zip(one.force_blocks(drawn), other.force_blocks(drawn), strict=True):
            same(a, b)

    return compare
