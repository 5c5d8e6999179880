"""Relaxations as a client sees them: order, faults, lost connections, and `equipot relax`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms, FixedPlane
from ase.io import read, write

from equipot.client import (
    Client,
    InvalidRequest,
    LimitExceeded,
    ModelChanged,
    RetryPolicy,
    ServerUnavailable,
)
from equipot.client.frames import whole_frames

Run = Callable[..., Any]


def test_results_come_as_they_are_done_and_are_returned_in_order(server: Any, cluster: Any) -> None:
    systems = [cluster(size) for size in (2, 3, 4)]
    with Client(server.address) as client:
        assert [index for index, _ in client.relax_iter(systems)] == [2, 1, 0]
        relaxed = client.relax(systems)
        assert [len(one.positions) for one in relaxed] == [2, 3, 4]
        np.testing.assert_array_equal(relaxed[1].energy, client.predict(systems[1]).energy[0])


def test_settings_travel(server: Any, crystal: Atoms) -> None:
    crystal.set_constraint(FixAtoms([0, 2]))
    with Client(server.address) as client:
        client.relax(
            crystal, fmax=0.1, steps=7, optimizer="lbfgs", cell="isotropic", pressure=0.5, max_step=0.3
        )
    asked = server.relaxed[-1]
    assert (asked.fmax, asked.max_steps, asked.max_step, asked.pressure) == (0.1, 7, 0.3, 0.5)
    assert (asked.optimizer, asked.cell) == (2, 3)
    assert np.flatnonzero(np.frombuffer(asked.fixed, dtype=np.uint8)).tolist() == [0, 2]


def test_only_what_has_no_result_is_asked_for_again(server: Any, cluster: Any) -> None:
    systems = [cluster(size) for size in (2, 3, 4, 5)]
    server.faults_after = [(grpc.StatusCode.UNAVAILABLE, []), (grpc.StatusCode.UNAVAILABLE, [])]
    with Client(server.address) as client:
        found = list(client.relax_iter(systems))
    assert sorted(index for index, _ in found) == [0, 1, 2, 3]
    assert [len(one.positions) for _, one in sorted(found, key=lambda pair: pair[0])] == [2, 3, 4, 5]
    assert [len(asked.structures.n_atoms) for asked in server.relaxed] == [4, 3, 2]
    assert [asked.model for asked in server.relaxed] == ["", server.pinned, server.pinned]


@pytest.mark.parametrize("told", [None, lambda *words: None])
def test_lost_connections_that_let_it_get_no_further_end_it(server: Any, cluster: Any, told: Any) -> None:
    server.interruptions = [1] * 20
    retry = RetryPolicy(attempts=3, initial_delay=0.0, max_delay=0.0)
    with Client(server.address, retry=retry) as client:
        relaxing = client.relax_iter(cluster(2), on_progress=told)
        with pytest.raises(ServerUnavailable, match="3 tries in a row got no further"):
            list(relaxing)
    assert len(server.relaxed) == 3


def test_other_faults_are_not_repeated(server: Any, cluster: Any) -> None:
    server.faults_after = [(grpc.StatusCode.RESOURCE_EXHAUSTED, [])]
    with Client(server.address) as client, pytest.raises(LimitExceeded):
        client.relax([cluster(2), cluster(3)])
    assert len(server.relaxed) == 1


def test_another_bundle_in_the_middle(server: Any, cluster: Any) -> None:
    server.faults_after = [(grpc.StatusCode.UNAVAILABLE, [])]
    with Client(server.address) as client:
        relaxing = client.relax_iter([cluster(2), cluster(3)])
        next(relaxing)
        server.digest = "sha256:" + "cd" * 32
        with pytest.raises(ModelChanged):
            list(relaxing)


def test_progress_names_the_structure(server: Any, cluster: Any) -> None:
    told = []
    server.limits.max_structures_per_request = 2
    with Client(server.address) as client:
        found = list(
            client.relax_iter(
                [cluster(2), cluster(3), cluster(4)], on_progress=lambda *words: told.append(words[0])
            )
        )
    assert sorted(told) == [0, 1, 2]
    assert sorted(index for index, _ in found) == [0, 1, 2]


def test_what_is_refused_costs_the_others_nothing(server: Any, cluster: Any) -> None:
    broken = {"atomic_numbers": [18, 18], "positions": np.zeros((3, 3))}
    helium = Atoms("He2", [[0, 0, 0], [0, 0, 3]])
    with Client(server.address) as client:
        relaxed = client.relax([cluster(2), broken, helium, cluster(3)])
    assert [one.failure is None for one in relaxed] == [True, False, False, True]
    assert [one.failure.index for one in relaxed if one.failure] == [1, 2]
    assert np.isnan(relaxed[2].energy)
    assert relaxed[2].forces is None


def test_a_constraint_that_would_be_lost(server: Any, cluster: Any) -> None:
    atoms = cluster(3)
    atoms.set_constraint(FixedPlane(0, (0, 0, 1)))
    with Client(server.address) as client, pytest.raises(InvalidRequest, match="FixedPlane"):
        client.relax(atoms)


def test_words_that_are_none(server: Any, cluster: Any) -> None:
    with Client(server.address) as client:
        with pytest.raises(InvalidRequest, match="one of fire, lbfgs"):
            client.relax(cluster(2), optimizer="bfgs")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="one of fixed, full, isotropic, constant_volume"):
            client.relax(cluster(2), cell="some")  # type: ignore[arg-type]


class TestVerb:
    def test_writes_in_the_order_of_the_file(
        self, server: Any, cluster: Any, tmp_path: Path, run_equipot: Run
    ) -> None:
        write(tmp_path / "in.extxyz", [cluster(2 + seed % 4, seed=seed) for seed in range(9)])
        out = tmp_path / "out.extxyz"
        done = run_equipot("relax", tmp_path / "in.extxyz", "--address", server.address, "--out", out)
        assert done.returncode == 0, done.stderr
        frames = read(out, ":")
        assert [len(frame) for frame in frames] == [2 + seed % 4 for seed in range(9)]
        assert all(frame.info["equipot_converged"] for frame in frames)
        assert "9 of 9 relaxed" in done.stdout
        assert f"results: {out}" in done.stdout

    def test_goes_on_where_it_was(self, server: Any, cluster: Any, tmp_path: Path, run_equipot: Run) -> None:
        write(tmp_path / "in.extxyz", [cluster(2, seed=seed) for seed in range(6)])
        words = ("relax", tmp_path / "in.extxyz", "--address", server.address, "--out", tmp_path / "out.xyz")
        whole = run_equipot(*words)
        assert whole.returncode == 0, whole.stderr
        text = (tmp_path / "out.xyz").read_text()
        assert "equipot_place" not in text
        assert "equipot_asked" not in text
        (tmp_path / "out.xyz").unlink()
        # The server answers the last one first, and is lost after three of them.
        server.refuse_after = 3
        stopped = run_equipot(*words)
        assert stopped.returncode == 2
        partial = tmp_path / "out.xyz.partial"
        assert [frame.place for frame in whole_frames(partial)] == [5, 4, 3]
        with partial.open("a") as torn:
            torn.write("2\nLattice=")
        kept = partial.read_bytes()
        for others in (("--fmax", 0.01), ("--cell", "full"), ("--model", "another"), ("--uncertainty",)):
            mixed = run_equipot(*words, *others, "--resume")
            assert mixed.returncode == 2
            assert "comes from --fmax 0.05 --steps 500" in mixed.stderr
            assert others[0] in mixed.stderr
            assert "leave --resume out to begin anew" in mixed.stderr
            assert partial.read_bytes() == kept
        write(tmp_path / "in.extxyz", [cluster(2, seed=seed) for seed in (0, 1, 2, 3, 5, 4)])
        mixed = run_equipot(*words, "--resume")
        assert mixed.returncode == 2
        assert "for structures sha256:" in mixed.stderr
        assert partial.read_bytes() == kept
        write(tmp_path / "in.extxyz", [cluster(2, seed=seed) for seed in range(6)])
        again = run_equipot(*words, "--resume")
        assert again.returncode == 0, again.stderr
        assert "going on after 3 frames" in again.stdout
        assert len(server.relaxed[-1].structures.n_atoms) == 3
        # Not what goes by that name now.
        assert server.relaxed[-1].model == f"lennard-jones@{server.digest}"
        assert (tmp_path / "out.xyz").read_text() == text
        assert not partial.exists()

    @pytest.mark.parametrize(
        ("verb", "said"), [(("relax",), "--fmax 0.05"), (("md", "--steps", 9), "--steps 9")]
    )
    def test_a_job_is_not_gone_on_with_by_other_words(
        self, server: Any, cluster: Any, tmp_path: Path, run_equipot: Run, verb: tuple[Any, ...], said: str
    ) -> None:
        write(tmp_path / "in.extxyz", cluster(2))
        out = tmp_path / "out.xyz"
        asked = "--fmax 0.2 --steps 500 for structures sha256:0"
        kept = json.dumps({"job": "relax-1", "address": server.address, "asked": asked})
        (tmp_path / "out.xyz.job").write_text(kept)
        words = (*verb, tmp_path / "in.extxyz", "--address", server.address, "--out", out, "--job")
        mixed = run_equipot(*words, "--resume")
        assert mixed.returncode == 2
        assert f"job relax-1 was asked for by {asked}, not by {said} " in mixed.stderr
        assert (tmp_path / "out.xyz.job").read_text() == kept

    def test_failures_are_named_and_the_rest_is_written(
        self, server: Any, cluster: Any, tmp_path: Path, run_equipot: Run
    ) -> None:
        write(tmp_path / "in.extxyz", [cluster(2), Atoms("He", [[0, 0, 0]]), cluster(3)])
        out = tmp_path / "out.extxyz"
        done = run_equipot("relax", tmp_path / "in.extxyz", "--address", server.address, "--out", out)
        assert done.returncode == 1
        assert "structure 1" in done.stdout
        assert "helium (2) is unknown" in done.stdout
        assert "equipot_failure" in read(out, 1).info
        assert len(read(out, ":")) == 3

    def test_a_server_that_is_not_there(
        self, unused_address: str, cluster: Any, tmp_path: Path, run_equipot: Run
    ) -> None:
        write(tmp_path / "in.extxyz", cluster(2))
        words = ("relax", tmp_path / "in.extxyz", "--address", unused_address, "--timeout", 2)
        done = run_equipot(*words, "--out", tmp_path / "out.extxyz")
        assert done.returncode == 2
        assert unused_address in done.stderr
        assert "Traceback" not in done.stderr
