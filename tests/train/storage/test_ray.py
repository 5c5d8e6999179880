"""A store held by real Ray nodes, larger than their memory: the same structures, nodes killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from equipot.cli.main import main
from equipot.train.errors import DataError
from equipot.train.storage.ray_store import Blocks
from equipot.train.store import Store
from equipot.train.structures import NAMES

_NODE_BYTES = 80 * 2**20  # Ray takes no less


def tiled(store: Path, out: Path, size: int) -> Path:
    """The store's shards so many times over, as links, that its arrays take `size` bytes."""
    body = json.loads((store / "manifest.json").read_text())
    one = sum(path.stat().st_size for path in (store / "shards").rglob("*.npy"))
    shards, body["shards"] = body["shards"], []
    times = -(-size // one)
    (out / "shards").mkdir(parents=True)
    for k in range(times):
        for entry in shards:
            name = f"{k:04d}-{entry['name']}"
            (out / "shards" / name).symlink_to(store / "shards" / entry["name"])
            body["shards"].append({**entry, "name": name})
    body["structures"] *= times
    body["atoms"] *= times
    body["digest"] = f"tiled:{times}:{body['digest']}"
    (out / "manifest.json").write_text(json.dumps(body))
    return out


@dataclass
class Running:
    cluster: Cluster
    second: object
    address: str


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Two nodes; the tests' process is a driver on the first."""
    node = {"num_cpus": 1, "object_store_memory": _NODE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield Running(cluster, second, cluster.address)
    ray.shutdown()
    cluster.shutdown()


def assert_reads_the_same(one: Store, other: Store, seed: int, batches: int, size: int = 64) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        wanted = rng.integers(0, len(one), size)
        ours, theirs = one.read(wanted), other.read(wanted)
        for name in NAMES:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_blocks_are_cut_and_found_alike(stores: dict[str, Path], tmp_path: Path) -> None:
    """Without a cluster: every structure lies in the block that says so, and in no other."""
    manifest = Store.open(tiled(stores["molecules"], tmp_path / "big", 30 * 2**20)).manifest
    blocks = Blocks(manifest)
    assert len(blocks) > len(manifest.shards) // 2
    places = np.concatenate(
        [
            np.stack([np.full(entry.structures, k), np.arange(entry.structures)], axis=1)
            for k, entry in enumerate(manifest.shards)
        ]
    )
    expected = np.concatenate(
        [np.full(stop - start, b) for b in range(len(blocks)) for _, start, stop in [blocks.span(b)]]
    )
    np.testing.assert_array_equal(blocks.of(places), expected)


def test_without_a_cluster_the_remedy_is_named(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(stores["molecules"]))
    if Path("/tmp/ray/ray_current_cluster").exists():
        pytest.skip("a Ray cluster runs on this machine")
    before = signal.getsignal(signal.SIGTERM)
    assert main(["data", "info", f"ray:{stores['molecules']}"]) == 2
    assert "no Ray cluster runs on this node; start it with `ray start --head`" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_larger_than_memory_and_a_node_killed(
    cluster: Running, stores: dict[str, Path], tmp_path: Path, assert_same: Callable[[Store, Store], None]
) -> None:
    folder = tiled(stores["molecules"], tmp_path / "big", 3 * _NODE_BYTES)
    handler = signal.getsignal(signal.SIGTERM)
    local, held = Store.open(folder), Store.open(f"ray:{folder}")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert_reads_the_same(local, held, seed=0, batches=10)
    for i in (*range(700), len(local) - 1, 5):
        np.testing.assert_array_equal(held.system(i).positions, local.system(i).positions)
    np.testing.assert_array_equal(held.element_counts([3, 1]), local.element_counts([3, 1]))

    def elsewhere() -> str:
        assert_reads_the_same(Store.open(folder), Store.open(f"ray:{folder}"), seed=1, batches=5)
        return str(ray.get_runtime_context().get_node_id())

    second = cluster.second.node_id  # type: ignore[attr-defined]
    on_it = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(second, soft=False)
    task = ray.remote(elsewhere).options(scheduling_strategy=on_it, num_cpus=0)
    assert ray.get(task.remote()) == second
    owners = ray.util.list_named_actors(all_namespaces=True)
    assert len(owners) == 2  # one a node, whoever opened the store
    cluster.cluster.remove_node(cluster.second, allow_graceful=False)
    assert_reads_the_same(local, held, seed=2, batches=10)
    child = os.fork()
    if child == 0:
        try:
            held.read([0])
        except DataError as error:
            os._exit(0 if "does not survive a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_owners_go_with_the_run_that_made_them_and_others_go_on(
    cluster: Running, stores: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiled(stores["molecules"], tmp_path / "big", 10 * 2**20)
    program = f"""
import sys
from equipot.train.store import Store
store = Store.open("ray:{folder}")
store.read([0])
print("holding", flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline().strip() == "holding"
        local, held = Store.open(folder), Store.open(f"ray:{folder}")
        assert_reads_the_same(local, held, seed=0, batches=3)
        maker.kill()
    assert_reads_the_same(local, held, seed=1, batches=3)
    ray.shutdown()
    ray.init(address=cluster.address, logging_level="error")
    deadline = time.monotonic() + 60
    while ray.util.list_named_actors(all_namespaces=True) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.util.list_named_actors(all_namespaces=True) == []


@pytest.mark.slow
def test_a_source_that_is_gone_is_named(cluster: Running, stores: dict[str, Path], tmp_path: Path) -> None:
    folder = tiled(stores["molecules"], tmp_path / "big", 10 * 2**20)
    held = Store.open(f"ray:{folder}")
    held.read([0])
    folder.rename(tmp_path / "moved")
    cluster.cluster.remove_node(cluster.second, allow_graceful=False)
    with pytest.raises(DataError, match=str(folder)) as refused:
        held.read(np.arange(0, len(held), 50))
    assert "\n" not in str(refused.value)
    (tmp_path / "moved").rename(folder)
    assert_reads_the_same(Store.open(folder), held, seed=0, batches=2)


@pytest.mark.slow
def test_training_from_a_cluster_is_training_from_mapped_files(
    cluster: Running, stores: dict[str, Path], tmp_path: Path
) -> None:
    """As a user does it, two ranks; the same losses to the last bit."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
[data]
stores = ["{stores["molecules"]}"]
[model]
width = 8
layers = 1
cutoff = 3.0
[batch]
structures = 8
[optimizer]
steps = 4
warmup_steps = 1
"""
    )
    metrics = []
    for memory in ("map", "ray"):
        out = tmp_path / memory
        command = ["train", recipe, "--ranks", 2, "--out", out, "--set", f"data.memory={memory}"]
        done = subprocess.run(
            [sys.executable, "-m", "equipot.cli", *map(str, command)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
        loss = rows[0].index("loss")
        metrics.append([row[loss] for row in rows[1:] if row[loss]])
    assert len(metrics[0]) == 4
    assert metrics[0] == metrics[1]
