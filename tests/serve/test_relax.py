"""Relaxations on the server: ASE's own course, in batches with everybody's, whatever the others do."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE, LBFGS
from tests.serve.conftest import Bundles, Process, arrays, crystal, inside, molecule, run, running

from equipot.client import Client, EquipotCalculator
from equipot.model.batch import System
from equipot.serve.config import RequestLimits, ServeConfig
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub


def asked(systems: list[System], **fields: Any) -> pb.RelaxRequest:
    words = {"model": "tiny", "fmax": 0.02, **fields}
    return pb.RelaxRequest(structures=encode_structures(arrays(systems)), **words)


async def read_all(call: Any) -> None:
    while await call.read():
        pass


async def next_progress(call: Any) -> None:
    """Reads on until the call tells how far it has come."""
    while not (await call.read()).HasField("progress"):
        pass


def results(replies: Iterable[pb.RelaxReply]) -> dict[int, pb.RelaxResult]:
    found: dict[int, pb.RelaxResult] = {}
    for reply in replies:
        if reply.HasField("result"):
            assert reply.result.index not in found
            found[reply.result.index] = reply.result
    return found


def numbers(raw: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.frombuffer(raw).reshape(-1, 3)


def as_atoms(system: System) -> Atoms:
    return Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)


class TestCourse:
    @pytest.mark.parametrize(("word", "optimizer"), [(pb.OPTIMIZER_FIRE, FIRE), (pb.OPTIMIZER_LBFGS, LBFGS)])
    def test_is_that_of_ase(
        self, stub: PotentialServiceStub, server: Process, word: pb.Optimizer.ValueType, optimizer: Any
    ) -> None:
        systems = [molecule(seed, n_atoms) for seed, n_atoms in enumerate((3, 6, 9, 4, 7))]
        there = results(stub.Relax(asked(systems, optimizer=word, max_steps=12)))
        assert sorted(there) == list(range(5))
        with EquipotCalculator(server.address, model="tiny") as calculator:
            for index, system in enumerate(systems):
                atoms = as_atoms(system)
                atoms.calc = calculator
                here = optimizer(atoms, logfile=None, maxstep=0.2)
                converged = here.run(fmax=0.02, steps=12)
                assert not there[index].HasField("failure")
                assert there[index].steps == here.nsteps
                assert there[index].converged == bool(converged)
                np.testing.assert_allclose(numbers(there[index].positions), atoms.positions, atol=1e-6)
                assert there[index].energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
                np.testing.assert_allclose(numbers(there[index].forces), atoms.get_forces(), atol=1e-5)

    @pytest.mark.parametrize(
        ("motion", "words"),
        [
            (pb.CELL_MOTION_FULL, {"scalar_pressure": 0.01}),
            (pb.CELL_MOTION_ISOTROPIC, {"hydrostatic_strain": True, "scalar_pressure": 0.01}),
            (pb.CELL_MOTION_CONSTANT_VOLUME, {"constant_volume": True}),
        ],
    )
    def test_of_a_cell_too(
        self,
        stub: PotentialServiceStub,
        server: Process,
        motion: pb.CellMotion.ValueType,
        words: dict[str, Any],
    ) -> None:
        system = crystal(3)
        pressure = words.get("scalar_pressure", 0.0)
        there = results(stub.Relax(asked([system], cell=motion, pressure=pressure, max_steps=8)))[0]
        atoms = as_atoms(system)
        with EquipotCalculator(server.address, model="tiny") as calculator:
            atoms.calc = calculator
            FIRE(FrechetCellFilter(atoms, **words), logfile=None).run(fmax=0.02, steps=8)
        np.testing.assert_allclose(numbers(there.positions), atoms.positions, atol=1e-6)
        np.testing.assert_allclose(numbers(there.cell), atoms.cell[:], atol=1e-6)
        assert len(there.stress) == 72
        assert not np.allclose(atoms.cell[:], system.cell)

    def test_with_atoms_that_stay(self, stub: PotentialServiceStub, server: Process) -> None:
        system = molecule(5)
        fixed = np.array([1, 0, 1, 0, 0, 0], dtype=np.uint8)
        there = results(stub.Relax(asked([system], fixed=fixed.tobytes(), max_steps=30)))[0]
        atoms = as_atoms(system)
        atoms.set_constraint(FixAtoms(mask=fixed.astype(bool)))
        with EquipotCalculator(server.address, model="tiny") as calculator:
            atoms.calc = calculator
            FIRE(atoms, logfile=None).run(fmax=0.02, steps=30)
        np.testing.assert_allclose(numbers(there.positions), atoms.positions, atol=1e-6)
        np.testing.assert_array_equal(
            numbers(there.positions)[fixed.astype(bool)], system.positions[fixed.astype(bool)]
        )

    def test_does_not_depend_on_company(self, stub: PotentialServiceStub) -> None:
        systems = [molecule(seed) for seed in range(12)]
        alone = results(stub.Relax(asked([systems[7]], max_steps=40)))[0]
        together = results(stub.Relax(asked(systems, max_steps=40)))[7]
        np.testing.assert_allclose(numbers(together.positions), numbers(alone.positions), atol=1e-7)
        assert together.steps == alone.steps

    def test_progress_is_told_between(self, stub: PotentialServiceStub) -> None:
        replies = list(stub.Relax(asked([molecule(1)], progress_every=2, fmax=1e-8, max_steps=7)))
        steps = [reply.progress.step for reply in replies if reply.HasField("progress")]
        assert steps == [2, 4, 6]
        assert all(math.isfinite(reply.progress.energy) for reply in replies[1:-1])
        assert not replies[-1].result.converged
        assert replies[-1].result.steps == 7


class TestFailures:
    def test_cost_the_others_nothing(self, stub: PotentialServiceStub) -> None:
        bad, unknown = molecule(2), molecule(3)
        bad.positions[1] = bad.positions[0]
        unknown.atomic_numbers[0] = 79
        found = results(stub.Relax(asked([molecule(1), bad, unknown, molecule(4)], max_steps=20)))
        assert [found[index].HasField("failure") for index in range(4)] == [False, True, True, False]
        assert [found[index].failure.index for index in (1, 2)] == [1, 2]
        assert found[2].failure.field == "atomic_numbers"
        assert math.isnan(found[1].energy)
        assert not found[1].converged

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"fmax": -0.1}, "fmax is -0.1"),
            ({"fmax": math.nan}, "fmax is nan"),
            ({"max_steps": 1_000_000}, "max_steps is 1000000"),
            ({"max_step": 3.0}, "max_step is 3"),
            ({"optimizer": 99}, "99 is no optimizer"),
            ({"cell": pb.CELL_MOTION_FULL}, "structure 0 is not periodic"),
            ({"pressure": 1.0}, "pressure is 1.0"),
            ({"fixed": b"\1"}, "fixed: has 1 bytes, expected 6"),
            ({"fixed": b"\2" * 6}, "fixed: holds 2"),
        ],
    )
    def test_of_whole_requests_name_the_field(
        self, stub: PotentialServiceStub, fields: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Relax(asked([molecule(1)], **fields)))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (caught.value.details() or "")

    def test_no_stress_no_cell(self, stub: PotentialServiceStub) -> None:
        with pytest.raises(grpc.RpcError, match="no stress"):
            list(stub.Relax(asked([crystal(1)], model="direct", cell=pb.CELL_MOTION_FULL)))

    def test_nothing_to_do(self, stub: PotentialServiceStub) -> None:
        empty = pb.RelaxRequest(model="tiny", structures=pb.Structures())
        assert [reply.WhichOneof("kind") for reply in stub.Relax(empty)] == ["begun"]


def test_a_caller_who_leaves_takes_everything_along(stub: PotentialServiceStub, server: Process) -> None:
    call: Any = stub.Relax(asked([molecule(seed) for seed in range(50)], fmax=1e-9, max_steps=100_000))
    threading.Timer(1.0, call.cancel).start()
    with pytest.raises(grpc.RpcError):
        list(call)
    for _ in range(200):
        if not server.sample("equipot_moving_structures") and not server.sample("equipot_queue_requests"):
            break
        threading.Event().wait(0.05)
    assert server.sample("equipot_moving_structures") == 0
    assert results(stub.Relax(asked([molecule(1)], max_steps=3)))


def test_a_server_that_stops_says_so(bundles: Bundles) -> None:
    async def test() -> None:
        config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1)
        async with inside(config) as at:
            endless = asked([molecule(1)], fmax=1e-9, max_steps=100_000, progress_every=1)
            call: Any = at.stub.Relax(endless)
            await next_progress(call)
            draining = asyncio.create_task(at.server.drain(5.0))
            with pytest.raises(grpc.RpcError) as caught:
                await read_all(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await draining
            assert at.value("moving_structures") == 0

    run(test())


def test_a_client_goes_on_after_the_server_was_killed(bundles: Bundles, tmp_path: Path) -> None:
    systems = [as_atoms(molecule(seed)) for seed in range(30)]
    words = [bundles.tiny, "--dtype", "float64"]
    with running(*words, stderr=tmp_path / "one") as first, Client(first.address) as client:
        port = int(first.address.rpartition(":")[2])
        expected = client.relax(systems, fmax=0.02, steps=40)
        found = {}
        relaxing = client.relax_iter(systems, fmax=0.02, steps=40)
        index, relaxed = next(relaxing)
        found[index] = relaxed
        first.popen.kill()
        first.popen.wait()
        with running(*words, port=port, stderr=tmp_path / "two"):
            for index, relaxed in relaxing:
                assert index not in found
                found[index] = relaxed
    assert sorted(found) == list(range(30))
    for index, relaxed in found.items():
        np.testing.assert_allclose(relaxed.positions, expected[index].positions, atol=1e-6)


def test_more_than_may_move_at_once_is_told_to_come_again(bundles: Bundles) -> None:
    async def test() -> None:
        limits = RequestLimits(request_atoms=10)
        config = ServeConfig(bundles=(bundles.tiny,), port=0, metrics_port=None, threads=1, limits=limits)
        async with inside(config) as at:
            first: Any = at.stub.Relax(asked([molecule(1)], fmax=1e-9, max_steps=100_000, progress_every=1))
            await next_progress(first)
            second: Any = at.stub.Relax(asked([molecule(2)]))
            with pytest.raises(grpc.RpcError) as caught:
                await second.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            await at.until(lambda: at.value("moving_structures") == 0)
            third: Any = at.stub.Relax(asked([molecule(2)], max_steps=2))
            assert (await third.read()).HasField("begun")
            assert (await third.read()).HasField("result")

    run(test())
