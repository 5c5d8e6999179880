"""What the audit keeps does not grow with what it reads, and is still right."""

import ase
import numpy as np
import pytest

from equipot.train.audit.blocks import KinSample, kin_keys, read_blocks
from equipot.train.audit.run import AuditOptions, AuditStopped, audit_stores
from equipot.train.audit.sketch import Extremes, Sketch
from equipot.train.storage import base
from equipot.train.store import Store

from .conftest import MakeMix, MakeStore, labelled


@pytest.mark.parametrize(("structures", "atoms"), [(7, 10**9), (10**9, 50), (10**9, 1), (10**9, 10**9)])
def test_blocks_are_bounded_and_make_up_the_store(
    alcohol_store: Store, structures: int, atoms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CHUNK_STRUCTURES", structures)
    monkeypatch.setattr(base, "CHUNK_ATOMS", atoms)
    blocks = list(read_blocks(alcohol_store))
    for block in blocks:
        assert len(block) == 1 or (len(block) <= structures and len(block.positions) <= atoms)
    assert np.concatenate([block.indices for block in blocks]).tolist() == list(range(len(alcohol_store)))
    np.testing.assert_array_equal(np.concatenate([block.energy for block in blocks]), alcohol_store.energies)
    for block in blocks[:: max(len(blocks) // 5, 1)]:
        system, labels = alcohol_store.system(block.first), alcohol_store.labels(block.first)
        n = block.n_atoms[0]
        np.testing.assert_array_equal(block.positions[:n], system.positions)
        np.testing.assert_array_equal(block.forces[:n], labels.forces)
        np.testing.assert_array_equal(block.counts[0], alcohol_store.element_counts([block.first])[0])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_a_sketch_is_good_to_a_per_cent(scale: float) -> None:
    values = np.random.default_rng(0).normal(scale=scale, size=20_000)
    sketch = Sketch()
    for part in np.array_split(np.append(values, [np.nan, np.inf]), 13):
        sketch.add(part)
    assert sketch.n == len(values)
    for q in (0.01, 0.25, 0.9, 0.999):
        assert sketch.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.02, abs=0.01 * scale)
    assert sketch.spread == pytest.approx(scale, rel=0.03)
    assert (sketch.low, sketch.high) == (values.min(), values.max())
    edges = np.linspace(-3 * scale, 3 * scale, 13)
    np.testing.assert_allclose(
        sketch.histogram(edges), np.histogram(values, edges)[0], atol=0.01 * len(values)
    )
    assert sketch.beyond(-2 * scale, 2 * scale) == pytest.approx((np.abs(values) > 2 * scale).sum(), rel=0.1)


def test_extremes_are_the_largest_of_all_parts() -> None:
    values = np.random.default_rng(1).permutation(1000).astype(float)
    extremes = Extremes(5)
    for part in np.array_split(np.arange(1000), 9):
        extremes.add(values[part], part)
    assert [value for value, _ in extremes.largest()] == [999, 998, 997, 996, 995]
    assert all(values[index] == value for value, index in extremes.largest())


def test_a_kin_sample_keeps_whole_kin_within_its_limit() -> None:
    kin = np.random.default_rng(2).integers(0, 500, 20_000)
    sample = KinSample(1000, 0)
    for part in np.array_split(np.arange(20_000), 40):
        sample.add(0, part, kin[part])
        assert len(sample._kept) <= 2 * 1000 + 500
    taken = sample.places()[:, 1]
    assert 900 <= len(taken) <= 1000
    assert not sample.complete
    for each in np.unique(kin[taken]):
        assert (kin[taken] == each).sum() == (kin == each).sum()
    again = KinSample(1000, 0)
    again.add(0, np.arange(20_000), kin)
    np.testing.assert_array_equal(again.places()[:, 1], taken)


def test_one_huge_kin_is_cut_and_not_dropped() -> None:
    sample = KinSample(100, 0)
    for part in np.array_split(np.arange(5000), 10):
        sample.add(0, part, np.zeros(len(part), np.int64))
    assert sample.places()[:, 1].tolist() == list(range(100))
    capped = KinSample(100, 0, per_kin=8)
    capped.add(0, np.arange(5000), np.arange(5000) // 1000)
    assert len(capped.places()) == 40


def test_kin_keys_do_not_see_orientation_order_or_supercell(
    alloy: list[ase.Atoms], make_store: MakeStore
) -> None:
    copies = []
    for atoms in alloy[:20]:
        turned = atoms.copy()
        turned.rotate(37, "x", rotate_cell=True)
        copies += [turned[::-1] * (2, 1, 1)]
    store = make_store([*alloy[:20], *(labelled(copy, energy=-1.0) for copy in copies)])
    (block,) = read_blocks(store)
    keys = kin_keys(block)
    np.testing.assert_array_equal(keys[:20], keys[20:])
    assert len(set(keys.tolist())) > 1


@pytest.mark.parametrize("after", [0, 3, 250])
def test_an_audit_can_be_stopped(alcohol_store: Store, after: int) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(AuditStopped) as stopped:
        audit_stores([alcohol_store], AuditOptions(), should_stop=should_stop)
    assert stopped.value.exit_code == 130
    assert asked == after + 1


def test_progress_rises_to_the_end(alcohol_store: Store) -> None:
    seen: list[float] = []
    audit_stores([alcohol_store], AuditOptions(), report=lambda what, done: seen.append(done))
    assert seen == sorted(seen)
    assert 0.5 < seen[-1] <= 1


def test_the_same_store_gives_the_same_audit(alcohol_store: Store) -> None:
    one, two = (audit_stores([alcohol_store], AuditOptions(sample=100)) for _ in range(2))
    assert one.findings == two.findings
    assert one.compared == two.compared


def test_references_are_those_of_a_model_trained_on_the_mix(
    alloy: list[ase.Atoms], alloy_store: Store, make_store: MakeStore, make_mix: MakeMix
) -> None:
    wrong = [labelled(a, energy=3 * a.calc.results["energy"]) for a in alloy]
    outside = make_store(wrong, "outside", level="PBE0")
    mix = make_mix([alloy_store], (0.5, 0.0, 0.5))
    audit = audit_stores([outside], AuditOptions(sample=100), mix=mix)
    np.testing.assert_allclose(
        audit.references["PBE"][list(mix.card.chemistry.elements)], mix.card.references.energy[0], atol=1e-6
    )
    everything = audit_stores([alloy_store, outside], AuditOptions(sample=100)).references
    np.testing.assert_allclose(audit.references["PBE0"], everything["PBE0"])
    assert np.abs(everything["PBE"] - audit.references["PBE"]).max() > 1e-4
