"""Sessions against the reference server: its faults, its restarts, and steps that are wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms

from equipot.client import (
    Client,
    ClientError,
    DeadlineExceeded,
    EquipotCalculator,
    InvalidStructure,
    LimitExceeded,
    ModelChanged,
    ServerError,
    ServerUnavailable,
)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "equipot-session"]


def test_a_step_is_answered_as_a_prediction(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = [cluster(3), cluster(4)]
    with Client(server.address) as client, client.session(atoms, stress=False) as session:
        for seed in range(3):
            for one in atoms:
                one.rattle(0.02, seed=seed)
            positions = np.concatenate([one.positions for one in atoms])
            step, alone = session.predict(positions), client.predict(atoms)
            np.testing.assert_array_equal(step.energy, alone.energy)
            np.testing.assert_array_equal(step.forces, alone.forces)
            assert [len(one.forces) for one in step if one.forces is not None] == [3, 4]
        assert len(server.opened) == 1
        assert not server.opened[0].structures.positions


def test_a_cell_that_changes_is_used_from_then_on(server: Any, crystal: Atoms) -> None:
    with Client(server.address) as client, client.session(crystal, stress=True) as session:
        session.predict(crystal.positions)
        crystal.set_cell(crystal.cell[:] * 1.01, scale_atoms=True)
        with_cell = session.predict(crystal.positions, crystal.cell[:][None])
        after = session.predict(crystal.positions)
        expected = client.predict(crystal, stress=True)
        for answer in (with_cell, after):
            np.testing.assert_array_equal(answer.stress, expected.stress)


def test_a_lost_connection_is_opened_again_with_the_cell_and_the_bundle(server: Any, crystal: Atoms) -> None:
    with Client(server.address) as client, client.session(crystal) as session:
        session.predict(crystal.positions, crystal.cell[:][None])
        wider = crystal.cell[:] * 1.02
        session.predict(crystal.positions, wider[None])
        server.stop()
        restart = threading.Timer(0.5, server.start)
        restart.start()
        answer = session.predict(crystal.positions + 0.01)
        restart.join()
        crystal.set_cell(wider)
        np.testing.assert_allclose(answer.energy, client.predict(crystal).energy, rtol=1e-12)
        assert server.opened[-1].model == server.pinned
        assert len(server.opened) == 2


def test_a_fault_is_typed_and_the_next_step_goes_on(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(3)
    with Client(server.address) as client, client.session(atoms) as session:
        first = session.predict(atoms.positions)
        server.fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(LimitExceeded):
            session.predict(atoms.positions)
        np.testing.assert_array_equal(session.predict(atoms.positions).energy, first.energy)


def test_a_server_that_is_gone_is_named(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(3)
    with Client(server.address, timeout=1.0) as client, client.session(atoms) as session:
        session.predict(atoms.positions)
        server.stop()
        with pytest.raises((ServerUnavailable, DeadlineExceeded), match=server.address):
            session.predict(atoms.positions)


def test_a_late_answer_is_no_later_step_s(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(3)
    with Client(server.address) as client, client.session(atoms, timeout=0.4) as session:
        session.predict(atoms.positions, timeout=20)
        server.delay = 1.5
        with pytest.raises(DeadlineExceeded):
            session.predict(atoms.positions)
        server.delay = 0.0
        moved = 1.1 * atoms.positions
        answer = session.predict(moved, timeout=20)
        atoms.positions = moved
        np.testing.assert_array_equal(answer.energy, client.predict(atoms).energy)


def test_another_bundle_is_noticed(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(3)
    with Client(server.address) as client, client.session(atoms) as session:
        session.predict(atoms.positions)
        server.digest = "sha256:" + "cd" * 32
        with pytest.raises(ModelChanged):
            session.predict(atoms.positions)


def test_an_answer_that_is_another_step_s(server: Any, cluster: Callable[..., Atoms]) -> None:
    atoms = cluster(3)
    server.skip_number = 1
    with (
        Client(server.address) as client,
        client.session(atoms) as session,
        pytest.raises(ServerError, match="step 1 of a session was answered as step 2"),
    ):
        session.predict(atoms.positions)


@pytest.mark.parametrize(
    ("positions", "cell", "field"),
    [(np.zeros((4, 3)), None, "positions"), (np.zeros((3, 3)), np.zeros((3, 3)), "cell")],
)
def test_other_atoms_are_refused(
    server: Any, cluster: Callable[..., Atoms], positions: Any, cell: Any, field: str
) -> None:
    with Client(server.address) as client, client.session(cluster(3)) as session:
        with pytest.raises(InvalidStructure, match="open another session") as caught:
            session.predict(positions, cell)
        assert caught.value.field == field
        assert np.isfinite(session.predict(cluster(3).positions).energy).all()


def test_a_session_of_nothing(server: Any) -> None:
    with Client(server.address) as client, pytest.raises(InvalidStructure, match="no structures"):
        client.session([])


def test_a_closed_session(server: Any, cluster: Callable[..., Atoms]) -> None:
    with Client(server.address) as client:
        session = client.session(cluster(3))
        session.predict(cluster(3).positions)
        session.close()
        session.close()
        with pytest.raises(ClientError, match="closed"):
            session.predict(cluster(3).positions)


def test_nothing_is_left_of_a_forgotten_session(server: Any, cluster: Callable[..., Atoms]) -> None:
    with Client(server.address) as client:
        session = client.session(cluster(3))
        session.predict(cluster(3).positions)
        assert threads()
        del session
        gc.collect()
        end = time.monotonic() + 10
        while threads() and time.monotonic() < end:
            time.sleep(0.05)
        assert not threads()


class TestCalculator:
    def test_moves_go_through_a_session(self, server: Any, cluster: Callable[..., Atoms]) -> None:
        atoms = cluster(4)
        with EquipotCalculator(server.address) as calculator:
            atoms.calc = calculator
            for seed in range(4):
                atoms.rattle(0.01, seed=seed)
                atoms.get_forces()
        assert len(server.seen) == 4
        assert len(server.opened) == 1

    def test_other_atoms_open_another(self, server: Any, cluster: Callable[..., Atoms]) -> None:
        with EquipotCalculator(server.address) as calculator, Client(server.address) as client:
            for size in (3, 4, 4, 3, 3):
                atoms = cluster(size)
                atoms.rattle(0.01, seed=len(server.seen))
                energy = calculator.get_potential_energy(atoms)
                assert energy == pytest.approx(client.predict(atoms).energy[0], rel=1e-12)

    def test_a_copy_has_a_session_of_its_own(self, server: Any, cluster: Callable[..., Atoms]) -> None:
        atoms = cluster(3)
        with EquipotCalculator(server.address) as calculator:
            atoms.calc = calculator
            for seed in range(2):
                atoms.rattle(0.01, seed=seed)
                expected = atoms.get_potential_energy()
            for other in (pickle.loads(pickle.dumps(calculator)), copy.deepcopy(calculator)):
                assert other.get_potential_energy(atoms) == expected
                other.close()
