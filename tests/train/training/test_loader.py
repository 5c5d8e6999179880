"""Batches come in order, the same ones whoever makes them and whenever; what goes wrong is named."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from equipot.model.batch import build_graph, collate
from equipot.model.config import ModelConfig
from equipot.model.neighbors import brute_force_neighbor_list
from equipot.train.dataset import Batch, Dataset
from equipot.train.edge_lists import edges_of
from equipot.train.errors import DataError
from equipot.train.loader import Loader, StepBatches
from equipot.train.prepare import prepare
from equipot.train.recipe import Recipe, RecipeError
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory
from equipot.train.sampler import Sampler
from equipot.train.store import Store
from equipot.train.structures import Structures
from equipot.train.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    run = RunDirectory(tmp_path_factory.mktemp("prepared") / "run")
    prepare(recipe(), run, resume=False)
    return RunCard.read(run.card).config


@pytest.fixture
def dataset(store: Path, config: ModelConfig) -> Dataset:
    return Dataset([Store.open(store)], config, cache_mib=1)


def sampler() -> Sampler:
    indices = np.stack([np.zeros(60, np.uint8), np.arange(60)], axis=1)
    return Sampler(indices, np.arange(60) % 7 + 1, structures=8, seed=4)


def loaded(
    dataset: Dataset, first: int, steps: int, *, rank: int = 0, ranks: int = 1, workers: int = 1
) -> list[StepBatches]:
    world = World(rank, ranks, CPU)
    with Loader(
        dataset, sampler(), world, accumulation=2, first_step=first, steps=steps, workers=workers
    ) as loader:
        return list(loader)


def assert_same(one: Batch, other: Batch) -> None:
    assert np.array_equal(one.keys, other.keys)
    for part, again in ((one.systems, other.systems), (one.targets, other.targets)):
        for name in part.__slots__:
            mine, its = getattr(part, name), getattr(again, name)
            assert mine.dtype == its.dtype
            assert torch.equal(mine.nan_to_num(-1), its.nan_to_num(-1)), name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_resumed_run_has_the_batches_it_would_have_had(dataset: Dataset, workers: int) -> None:
    whole = loaded(dataset, 0, 16)  # into the third epoch
    assert [made.step for made in whole] == list(range(16))
    for first in (3, 7, 10):
        rest = loaded(dataset, first, 16, workers=workers)
        for made, again in zip(whole[first:], rest, strict=True):
            assert made.step == again.step
            for one, other in zip(made.batches, again.batches, strict=True):
                assert_same(one, other)


def test_ranks_share_the_global_batch(dataset: Dataset) -> None:
    whole = loaded(dataset, 0, 3)
    for ranks in (2, 3, 4):
        shares = [loaded(dataset, 0, 3, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step in range(3):
            keys = np.concatenate([batch.keys for share in shares for batch in share[step].batches])
            expected = np.concatenate([batch.keys for batch in whole[step].batches])
            assert sorted(map(tuple, keys.tolist())) == sorted(map(tuple, expected.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_what_graphs_one_by_one_are(store: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    opened = Store.open(store)
    keys = np.array([(0, i) for i in (7, 0, 33, 2, 59, 33)])
    made = Dataset([opened], config).batch(keys, dtype=dtype).systems
    expected = collate([build_graph(opened.system(int(i)), config.cutoff) for _, i in keys], dtype=dtype)
    edges = []
    for systems in (made, expected):
        assert bool((systems.receivers.diff() >= 0).all())
        columns = torch.stack([systems.receivers, systems.senders, *systems.cell_shifts.long().T])
        edges.append(columns[:, np.lexsort(columns.numpy()[::-1])])
    assert torch.equal(*edges)
    for name in set(made.__slots__) - {"senders", "receivers", "cell_shifts", "positions"}:
        assert getattr(made, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    torch.testing.assert_close(made.positions, expected.positions)


def test_structures_of_several_stores_keep_their_order(store: Path, config: ModelConfig) -> None:
    stores = [Store.open(store), Store.open(store)]
    keys = np.array([(1, 5), (0, 2), (1, 0), (0, 9), (0, 2)])
    mixed = Dataset(stores, config).batch(keys)
    single = Dataset(stores[:1], config).batch(keys * [0, 1])
    for name in mixed.systems.__slots__:
        assert torch.equal(getattr(mixed.systems, name), getattr(single.systems, name))
    assert torch.equal(mixed.targets.energy, single.targets.energy)


def test_a_damaged_store_is_one_error_that_names_the_structure(
    store: Path, config: ModelConfig, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "store")
    (path,) = (tmp_path / "store").glob("shards/*/positions.npy")
    positions = np.load(path, mmap_mode="r+")
    damaged = Store.open(tmp_path / "store")
    positions[damaged.n_atoms[:17].sum() + 1, 2] = np.inf
    positions.flush()
    with pytest.raises(DataError, match=r"store\[17\] \(emt.extxyz, frame 17\): .* not a finite number"):
        loaded(Dataset([damaged], config), 0, 14)
    (path,) = (tmp_path / "store").glob("shards/*/atom_offsets.npy")
    offsets = np.load(path, mmap_mode="r+")
    offsets[30] = 2**40
    offsets.flush()
    with pytest.raises(DataError, match=r"shards/00000: the atoms of its structure (29|30) cannot be found"):
        loaded(Dataset([Store.open(tmp_path / "store")], config), 0, 14)


def test_what_is_made_ahead_is_bounded_by_bytes(dataset: Dataset) -> None:
    made: list[int] = []

    class Watched(Sampler):
        def global_batch(self, step: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
            made.append(step)
            return super().global_batch(step)

    indices = np.stack([np.zeros(60, np.int64), np.arange(60)], axis=1)
    watched = Watched(indices, np.ones(60, np.int64), structures=8, seed=4)
    world = World(0, 1, CPU)
    loader = Loader(dataset, watched, world, accumulation=1, first_step=0, steps=20, workers=3, bytes_ahead=1)
    with loader:
        steps = iter(loader)
        for _ in range(6):
            next(steps)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert made in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6])  # the one ahead may not have begun


def test_a_structure_above_the_limit_is_refused_by_name(train: Callable[..., Path], tmp_path: Path) -> None:
    message = r"batch\.max_edges = 30, but \d+ structure.*store\[\d+\] \(emt.extxyz, frame \d+\).* ≥ \d+"
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "run", "batch.max_edges=30")


@pytest.mark.parametrize("cutoff", [3.0, 9.0])
def test_edges_are_those_of_every_pair_and_image(cutoff: float) -> None:
    random = np.random.default_rng(2)
    frames = [
        molecule("CH3CH2OH"),
        bulk("Cu"),
        bulk("NaCl", "rocksalt", a=5.6, cubic=True),
        fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=False),
        Atoms("H30", random.uniform(0, 9, (30, 3))),
        Atoms("He"),
    ]
    parts = [
        Structures(
            n_atoms=np.array([len(atoms)]),
            cell=atoms.cell.array[None],
            pbc=atoms.pbc[None],
            charge=np.zeros(1, np.int32),
            spin_multiplicity=np.zeros(1, np.int32),
            energy=np.zeros(1),
            stress=np.zeros((1, 3, 3)),
            atomic_numbers=atoms.numbers.astype(np.uint8),
            positions=atoms.positions,
            forces=np.zeros((len(atoms), 3)),
        )
        for atoms in frames
    ]
    first = 0
    found = edges_of(Structures.joined(parts), cutoff)
    for atoms in frames:
        expected = brute_force_neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
        mine = (found.receivers >= first) & (found.receivers < first + len(atoms))
        ends = np.stack([found.receivers[mine], found.senders[mine]], axis=1) - first
        rows = np.concatenate([ends, found.cell_shifts[mine]], axis=1)
        rows = rows[np.lexsort(rows.T[::-1])]
        wanted = np.column_stack([expected.receivers, expected.senders, expected.cell_shifts])
        np.testing.assert_array_equal(rows, wanted[np.lexsort(wanted.T[::-1])])
        first += len(atoms)
    assert (np.diff(found.receivers) >= 0).all()
