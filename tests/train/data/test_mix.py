"""A mix: which structures are seen how often, in which split and subset; and what makes it refuse."""

import json
import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.train.errors import DataError
from equipot.train.importer import ImportOptions, import_files
from equipot.train.mix import CARD, Mix, bytes_of
from equipot.train.mix_build import build_mix
from equipot.train.mix_request import load_request, parse_request
from equipot.train.places import Places, Segment, in_blocks
from equipot.train.reference_fit import RIDGE
from equipot.train.splits import NAMES
from equipot.train.store import Store

MakeFrames = Callable[..., list[ase.Atoms]]
MakeStore = Callable[..., Store]
MakeMix = Callable[..., Mix]


@pytest.fixture(scope="module")
def stores(make_frames: MakeFrames, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Two sources of one level and one of another, grouped by trajectory, by blocks and not at all."""
    home = tmp_path_factory.mktemp("stores")
    trajectories, blocks = make_frames(120, seed=1), make_frames(80, seed=2, sizes=(4,))
    for k, atoms in enumerate(trajectories):
        atoms.info["trajectory"] = f"t{k // 6 if k < 90 else k}"
    for atoms in blocks:
        atoms.numbers[:] = (1, 6, 8, 1)  # blocks are of one composition
    made = {}
    for name, frames, level, group_by in (
        ("a", trajectories, "PBE/def2-SVP", "auto"),
        ("b", blocks, "PBE/def2-SVP", "block:4"),
        ("c", make_frames(60, seed=3, periodic=True), "PBE", "frame"),
    ):
        ase.io.write(home / f"{name}.extxyz", frames)
        options = ImportOptions(level_of_theory=level, licence="MIT", name=name, group_by=group_by)
        import_files([home / f"{name}.extxyz"], home / name, options)
        made[name] = Store.open(home / name)
    return made


@pytest.fixture
def make_mix(stores: dict[str, Store], tmp_path: Path) -> MakeMix:
    """A mix of all three: `make_mix("name", seed=1, a={"weight": 2})`."""

    def make(name: str = "mix", seed: int = 0, fractions: Any = (0.7, 0.1, 0.2), **options: Any) -> Mix:
        sources = {key: {"store": store.path, **options.get(key, {})} for key, store in stores.items()}
        request = parse_request({"seed": seed, "fractions": fractions, "sources": sources}, "test")
        return build_mix(request, tmp_path / name)

    return make


def pairs(places: Places) -> list[tuple[int, int]]:
    return [(k, i) for block in in_blocks(places) for k, i in block.tolist()]


def groups_of(mix: Mix, places: Places) -> set[int]:
    return {int(mix.stores[k].groups[i]) for k, i in pairs(places)}


def of_source(places: Places, k: int) -> list[int]:
    return [i for store, i in pairs(places) if store == k]


def test_every_structure_is_in_one_split_and_every_source_in_its_share(make_mix: MakeMix) -> None:
    mix = make_mix()
    everything = [pair for name in NAMES for pair in pairs(mix.part(name))]
    assert sorted(everything) == [(k, i) for k, s in enumerate(mix.stores) for i in range(len(s))]
    for k, store in enumerate(mix.stores):
        sizes = [len(of_source(mix.part(name), k)) for name in NAMES]
        np.testing.assert_allclose(np.array(sizes) / len(store), (0.7, 0.1, 0.2), atol=0.06)


@pytest.mark.parametrize("seed", [0, 7])
def test_smaller_subsets_lie_inside_larger_ones_and_no_group_is_in_two_splits(
    make_mix: MakeMix, seed: int
) -> None:
    mix = make_mix(f"mix{seed}", seed=seed)
    validation, test = (groups_of(mix, mix.part(name)) for name in NAMES[1:])
    assert not validation & test
    smaller: set[tuple[int, int]] = set()
    for fraction in (0.01, 0.1, 0.2, 0.35, 0.5, 0.9, 1.0):
        once, drawn = mix.training(fraction)
        assert pairs(once) == pairs(drawn)
        found = set(pairs(once))
        assert smaller <= found
        assert not groups_of(mix, once) & (validation | test)
        for k in range(3):
            whole = mix.card.sources[k].counts["train"].structures
            assert len(of_source(once, k)) == math.ceil(whole * Fraction(str(fraction)))
        smaller = found
    assert smaller == set(pairs(mix.part("train")))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    make_mix: MakeMix, tree_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    one, two, other = make_mix("one", seed=3), make_mix("two", seed=3), make_mix("three", seed=4)
    assert tree_bytes(one.path) == tree_bytes(two.path)
    assert set(pairs(one.part("test"))) != set(pairs(other.part("test")))
    assert one.card.digest == two.card.digest != other.card.digest
    assert {path.name for path in one.path.parent.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize("weight", [0.5, 0.3, 1.0, 2.0, 2.75])
def test_weights_are_exact_and_even(make_mix: MakeMix, weight: float) -> None:
    mix = make_mix(a={"weight": weight})
    plain = make_mix("plain")
    for fraction in (0.5, 1.0):
        once, drawn = mix.training(fraction)
        counts: dict[int, int] = {}
        for i in of_source(drawn, 0):
            counts[i] = counts.get(i, 0) + 1
        assert sum(counts.values()) == int(len(of_source(once, 0)) * Fraction(str(weight)))
        assert set(counts) <= set(of_source(once, 0))
        assert set(counts.values()) <= {int(weight), int(weight) + 1} - ({0} if weight >= 1 else set())
        assert of_source(drawn, 1) == of_source(once, 1)
    assert pairs(mix.part("train")) == pairs(plain.part("train"))
    half, whole = (mix.training(fraction)[1] for fraction in (0.5, 1.0))
    assert of_source(whole, 0)[: len(of_source(half, 0))] == of_source(half, 0)


def test_draws_are_looked_up_anywhere() -> None:
    indices = np.arange(100, 1100, dtype=np.uint32)
    places = Places([Segment(0, indices, Fraction(3, 7)), Segment(4, indices[:5], Fraction(5, 2))])
    assert len(places) == 1000 * 3 // 7 + 12
    (whole,) = in_blocks(places)
    assert whole[-12:].tolist() == [[4, 100 + j] for j in (0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4)]
    rows = np.random.default_rng(0).permutation(len(places))[:200]
    np.testing.assert_array_equal(places[rows], whole[rows])
    with pytest.raises(IndexError):
        places[np.array([len(places)])]


def test_caps_bound_and_spread(make_mix: MakeMix) -> None:
    free = make_mix("free")
    mix = make_mix(a={"max_per_group": 2}, b={"max_structures": 30}, c={"max_atoms": 3})
    taken = [[i for name in NAMES for i in of_source(mix.part(name), k)] for k in range(3)]
    _, counts = np.unique(mix.stores[0].groups[taken[0]], return_counts=True)
    assert counts.max() == 2
    assert len(counts) == free.stores[0].manifest.groups
    within = {g: np.flatnonzero(mix.stores[0].groups == g) for g in mix.stores[0].groups[taken[0]]}
    for group, members in within.items():
        chosen = [np.searchsorted(members, i) for i in taken[0] if mix.stores[0].groups[i] == group]
        assert len(members) < 6 or max(chosen) - min(chosen) == len(members) // 2
    assert len(taken[1]) == 30
    assert len(set(mix.stores[1].groups[taken[1]].tolist())) == 8  # 7 groups of 4, and one in part
    assert set(mix.stores[2].n_atoms[taken[2]].tolist()) == {2, 3}
    assert len(taken[2]) == int((mix.stores[2].n_atoms <= 3).sum())
    reasons = [dict(source.left_out) for source in mix.card.sources]
    assert reasons == [{"caps": 120 - len(taken[0])}, {"caps": 50}, {"more atoms than max_atoms": 20}]


def test_counts_say_what_is_there(make_mix: MakeMix) -> None:
    mix = make_mix()
    for k, (source, store) in enumerate(zip(mix.card.sources, mix.stores, strict=True)):
        for name in NAMES:
            indices = of_source(mix.part(name), k)
            atoms = int(store.n_atoms[indices].sum())
            count = source.counts[name]
            assert (count.structures, count.atoms) == (len(indices), atoms)
            assert count.bytes == bytes_of(store, len(indices), atoms)
        training = of_source(mix.part("train"), k)
        present = store.element_counts(training).sum(axis=0)
        assert source.elements == {str(z): int(present[z]) for z in np.flatnonzero(present)}
        assert sum(source.sizes) == len(training)


def test_a_subset_in_bytes_is_the_largest_that_fits(make_mix: MakeMix) -> None:
    mix = make_mix()

    def size(fraction: float | str) -> int:
        once, _ = mix.training(fraction)
        indices = [of_source(once, k) for k in range(3)]
        atoms = [int(s.n_atoms[i].sum()) for s, i in zip(mix.stores, indices, strict=True)]
        return sum(bytes_of(s, len(i), a) for s, i, a in zip(mix.stores, indices, atoms, strict=True))

    for budget in ("10 kB", "50kB", "1 GB"):
        share = mix.share(budget)
        assert size(budget) <= int(float(budget.rstrip("kGB ")) * (1e3 if "k" in budget else 1e9))
        assert share == 1 or size(float(share) + 2e-6 + 1 / 40) > size(budget)
    assert mix.share("1 GB") == 1
    assert size("10 kB") > 7000
    assert set(pairs(mix.training("10 kB")[0])) < set(pairs(mix.training("50 kB")[0]))
    with pytest.raises(DataError, match=r"the smallest subset of .* takes"):
        mix.training("100 B")


def test_a_group_that_two_stores_share_is_on_one_side(
    make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path
) -> None:
    sources: dict[str, dict[str, object]] = {}
    for name, level in (("dft", "PBE"), ("cc", "CCSD(T)")):
        frames = make_frames(90, seed=len(name))
        for k, atoms in enumerate(frames):
            atoms.info["mol_id"] = k // 3 if name == "dft" else k // 5
        sources[name] = {"store": make_store(frames, name, level=level).path}
    mix = build_mix(parse_request({"sources": sources}, "test"), tmp_path / "mix")
    parts = [groups_of(mix, mix.part(name)) for name in NAMES]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_another_source_leaves_the_splits_of_the_first_alone(
    stores: dict[str, Store], make_mix: MakeMix, tmp_path: Path
) -> None:
    alone = build_mix(
        parse_request({"fractions": (0.7, 0.1, 0.2), "sources": {"a": {"store": stores["a"].path}}}, "test"),
        tmp_path / "alone",
    )
    together = make_mix()
    for name in NAMES:
        assert pairs(alone.part(name)) == pairs(together.part(name).of_store(0))


def test_a_store_that_grows_keeps_most_of_its_splits(
    make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path
) -> None:
    frames = make_frames(600, seed=5)
    for k, atoms in enumerate(frames):
        atoms.info["mol_id"] = k // 2
    mixes = []
    for name, count in (("young", 500), ("old", 600)):
        source = {"store": make_store(frames[:count], name).path}
        mixes.append(build_mix(parse_request({"sources": {name: source}}, "test"), tmp_path / f"m{name}"))
    young, old = ([groups_of(mix, mix.part(name)) for name in NAMES] for mix in mixes)
    moved = sum(len(young[k] & old[j]) for k in range(3) for j in range(3) if k != j)
    assert moved <= 0.05 * 250
    assert not young[1] & old[2]
    assert not young[2] & old[1]


def direct_ridge(mix: Mix, level: str) -> NDArray[np.float64]:
    """The ridge as further rows of a least-squares problem, over all training structures at once."""
    elements = list(mix.card.chemistry.elements)
    counts, energies = [], []
    for k, i in pairs(mix.part("train")):
        if mix.stores[k].manifest.level_of_theory == level:
            numbers = mix.stores[k].system(i).atomic_numbers
            counts.append(np.bincount(numbers, minlength=119)[elements])
            energies.append(mix.stores[k].labels(i).energy)
    columns, wanted = np.array(counts, dtype=float), np.array(energies)
    mean = wanted.sum() / columns.sum()
    weight = np.sqrt((columns**2).sum(axis=0))
    rows = np.vstack([columns / weight, np.sqrt(RIDGE) * np.eye(len(elements))])
    right = np.concatenate([wanted - mean * columns.sum(axis=1), np.zeros(len(elements))])
    solved: NDArray[np.float64] = mean + np.linalg.lstsq(rows, right, rcond=None)[0] / weight
    return solved


def test_references_are_those_of_a_direct_solution_and_see_training_alone(
    make_mix: MakeMix,
    stores: dict[str, Store],
    make_frames: MakeFrames,
    make_store: MakeStore,
    tmp_path: Path,
) -> None:
    mix = make_mix(b={"weight": 3})  # what is seen more often is no more often in the fit
    for row, level in enumerate(mix.card.levels):
        np.testing.assert_allclose(mix.card.references.energy[row], direct_ridge(mix, level), rtol=1e-8)
    forces = [mix.stores[k].labels(i).forces.ravel() for k, i in pairs(mix.part("train")) if k == 2]
    assert mix.card.references.scale[1] == pytest.approx(np.sqrt(np.mean(np.concatenate(forces) ** 2)))

    frames = make_frames(60, seed=3, periodic=True)
    for name in NAMES[1:]:
        for i in of_source(mix.part(name), 2):
            frames[i].calc.results["energy"] += 1000.0
            frames[i].calc.results["forces"] *= 50
    # groups of single frames go by the file's checksum: the same ones are wanted here
    shutil.copytree(stores["c"].path, tmp_path / "changed")
    other = make_store(frames, "other", group_by="frame", level="PBE")
    for array in ("energy", "forces"):
        found = next(other.path.rglob(f"{array}.npy"))
        shutil.copy(found, next((tmp_path / "changed").rglob(f"{array}.npy")))
    sources = {
        name: {"store": tmp_path / "changed" if name == "c" else store.path} for name, store in stores.items()
    }
    request = parse_request({"fractions": (0.7, 0.1, 0.2), "sources": sources}, "test")
    changed = build_mix(request, tmp_path / "other-mix")
    assert changed.stores[2].energies.max() > 500
    np.testing.assert_array_equal(changed.card.references.energy, mix.card.references.energy)
    np.testing.assert_array_equal(changed.card.references.scale, mix.card.references.scale)


def test_what_training_lacks_is_left_out_of_the_others(
    make_frames: MakeFrames, make_store: MakeStore, tmp_path: Path
) -> None:
    frames = make_frames(40)
    plain = make_store(frames, "plain", group_by="block:2")
    probe = parse_request({"sources": {"s": {"store": plain.path}}}, "test")
    mix = build_mix(probe, tmp_path / "probe")
    odd = of_source(mix.part("test"), 0)[0]
    frames[odd].info["charge"] = 1
    file = tmp_path / "plain.extxyz"
    assert file.exists()
    charged = make_store(frames, "charged", group_by="block:2")
    # blocks go by the file's checksum, so the groups of the plain store are put in their place
    shutil.copy(next(plain.path.rglob("group.npy")), next(charged.path.rglob("group.npy")))
    request = parse_request({"sources": {"s": {"store": charged.path}}}, "test")
    less = build_mix(request, tmp_path / "less")
    assert less.card.chemistry.charges == (0,)
    assert sorted([*of_source(less.part("test"), 0), odd]) == of_source(mix.part("test"), 0)
    assert list(less.card.sources[0].left_out.values()) == [1]
    count = less.card.sources[0].counts["test"]
    assert count.atoms == int(charged.n_atoms[of_source(less.part("test"), 0)].sum())


def test_stores_that_moved_are_found_and_those_that_grew_are_refused(
    stores: dict[str, Store], run_import: Callable[..., Any], make_frames: MakeFrames,
    write_frames_to: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    for name in stores:
        shutil.copytree(stores[name].path, tmp_path / name)
    sources = {name: {"store": tmp_path / name} for name in stores}
    mix = build_mix(parse_request({"sources": sources}, "test"), tmp_path / "mix")
    together = tmp_path / "moved"
    together.mkdir()
    for name in (*stores, "mix"):
        (tmp_path / name).rename(together / name)
    again = Mix.open(together / "mix")  # the stores lie as they lay, seen from the mix
    assert pairs(again.part("train")) == pairs(mix.part("train"))
    apart = tmp_path / "apart"
    apart.mkdir()
    for name in stores:
        (together / name).rename(apart / name)
    with pytest.raises(
        DataError, match=r"store of its source a is not at .*/a.* say where .* --store-root DIR"
    ):
        Mix.open(together / "mix")
    Mix.open(together / "mix", store_root=apart)
    Mix.open(together / "mix", stores=[apart / name for name in stores])
    with pytest.raises(DataError, match=r"is of 3 store\(s\), 1 given"):
        Mix.open(together / "mix", stores=[apart / "a"])
    more = write_frames_to(make_frames(5, seed=99), "more.extxyz")
    run_import(more, out=apart / "b", group_by="block:4")
    with pytest.raises(DataError, match=r"apart/b: is not the store that .* has grown since .* make the mix"):
        Mix.open(together / "mix", store_root=apart)


def test_a_damaged_mix_is_told(make_mix: MakeMix) -> None:
    mix = make_mix()
    mix.verify()
    lists = mix.path / "train.npy"
    body = bytearray(lists.read_bytes())
    body[-1] ^= 1
    lists.write_bytes(body)
    with pytest.raises(DataError, match=r"train\.npy: has changed since the mix was made"):
        Mix.open(mix.path).verify()
    lists.write_bytes(body[:-8])
    with pytest.raises(DataError, match=r"train\.npy: .* the mix is damaged"):
        Mix.open(mix.path)
    card = json.loads((mix.path / CARD).read_text())
    for change, words in (
        ({"version": 99}, "mix version 99, this equipot reads up to"),
        ({"format": "x"}, "is not the index of a mix"),
        ({"sources": [{"name": "a"}]}, "damaged"),
    ):
        (mix.path / CARD).write_text(json.dumps(card | change))
        with pytest.raises(DataError, match=words):
            Mix.open(mix.path)


def test_a_mix_that_fails_leaves_nothing(make_mix: MakeMix, stores: dict[str, Store], tmp_path: Path) -> None:
    def stop(what: str, fraction: float) -> None:
        if fraction > 0.3:
            raise KeyboardInterrupt

    sources = {name: {"store": store.path} for name, store in stores.items()}
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        build_mix(parse_request({"sources": sources}, "test"), tmp_path / "mix", on_progress=stop)
    assert set(tmp_path.iterdir()) == before
    make_mix()
    with pytest.raises(DataError, match="mix: is there already; remove it"):
        make_mix()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[sources.a]\nstor = "a"', ["unknown key sources.a.stor", "did you mean sources.a.store"]),
        ('[source.a]\nstore = "a"', ["unknown key source", "did you mean sources"]),
        ("[sources.a]\nweight = 1", ["sources.a.store is missing"]),
        ('[sources.a]\nstore = "a"\nweight = -1', ["sources.a.weight = -1", "greater than 0"]),
        ('[sources.a]\nstore = "a"\nweight = nan', ["sources.a.weight"]),
        ('[sources.a]\nstore = "a"\nmax_atoms = 0', ["sources.a.max_atoms = 0"]),
        ('[sources.a]\nstore = "a"\nmax_structures = 1.5', ["sources.a.max_structures = 1.5"]),
        ('fractions = [0.9, 0.2, 0.1]\n[sources.a]\nstore = "a"', ["add up to 1"]),
        ('fractions = [0.0, 0.5, 0.5]\n[sources.a]\nstore = "a"', ["train on something"]),
        ('seed = -1\n[sources.a]\nstore = "a"', ["seed = -1"]),
        ("[sources]", ["sources"]),
        ("seed = ", ["not valid TOML"]),
        ('[sources.a]\nstore = "none"', ["source a: ", "none: no such store"]),
        ('[sources.a]\nstore = "a"\nlevel_of_theory = "HF"', ["source a: ", "'PBE/def2-SVP'", "'HF'"]),
        ('[sources.a]\nstore = "a"\n[sources.z]\nstore = "a"', ["sources a and z are the same data"]),
        ('[sources.a]\nstore = "a"\nmax_atoms = 1', ["nothing to split"]),
    ],
)
def test_mistakes_in_a_mix_file_are_named(
    stores: dict[str, Store], tmp_path: Path, text: str, words: list[str]
) -> None:
    path = stores["a"].path.parent / "mix.toml"  # relative paths are relative to it
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        build_mix(load_request(path), tmp_path / "out")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_mix_file_is_the_same_as_options(
    stores: dict[str, Store], make_mix: MakeMix, tmp_path: Path
) -> None:
    file = stores["a"].path.parent / "same.toml"
    file.write_text(
        'seed = 5\nfractions = [0.7, 0.1, 0.2]\n[sources.a]\nstore = "a"\nweight = 0.5\n'
        '[sources.b]\nstore = "b"\n[sources.c]\nstore = "c"\nmax_atoms = 3\nlevel_of_theory = "PBE"\n'
    )
    mix = build_mix(load_request(file), tmp_path / "from-file")
    assert mix.card.digest == make_mix(seed=5, a={"weight": 0.5}, c={"max_atoms": 3}).card.digest
