"""Dynamics on the server: ASE's own course, frames and tokens as they come, and what cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from tests.serve.conftest import Process, arrays, crystal, molecule
from tests.serve.test_relax import as_atoms, numbers

from equipot.client import EquipotCalculator
from equipot.model.batch import System
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import encode_structures
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

FS = units.fs
TEMPERATURE = 150.0


def asked(systems: list[System], **fields: Any) -> pb.SimulateRequest:
    words = {"model": "tiny", "timestep": 0.5, "temperature": TEMPERATURE, "steps": 10, **fields}
    return pb.SimulateRequest(structures=encode_structures(arrays(systems)), **words)


@dataclass
class Course:
    """What was told of one structure."""

    frames: dict[int, pb.MotionFrame] = field(default_factory=dict)
    observations: dict[int, pb.MotionObservation] = field(default_factory=dict)
    tokens: dict[int, bytes] = field(default_factory=dict)
    result: pb.SimulateResult | None = None

    @property
    def failure(self) -> pb.Failure:
        assert self.result is not None
        assert self.result.HasField("failure")
        return self.result.failure


def courses(replies: Iterable[pb.SimulateReply], count: int = 1) -> list[Course]:
    found = [Course() for _ in range(count)]
    for reply in replies:
        match reply.WhichOneof("kind"):
            case "frame":
                frames = found[reply.frame.index].frames
                assert reply.frame.step > max(frames, default=-1)
                frames[reply.frame.step] = reply.frame
            case "observation":
                found[reply.observation.index].observations[reply.observation.step] = reply.observation
            case "token":
                found[reply.token.index].tokens[reply.token.step] = reply.token.token
            case "result":
                assert found[reply.result.index].result is None
                found[reply.result.index].result = reply.result
    assert all(one.result is not None for one in found)
    return found


BATHS: dict[str, tuple[dict[str, Any], Callable[[Atoms, Any], Any]]] = {
    "velocity_verlet": ({}, lambda atoms, rng: VelocityVerlet(atoms, 0.5 * FS)),
    "langevin": (
        {"friction": 0.02},
        lambda atoms, rng: Langevin(
            atoms, 0.5 * FS, temperature_K=TEMPERATURE, friction=0.02 / FS, fixcm=False, rng=rng
        ),
    ),
    "bussi": (
        {"thermostat_time": 20.0},
        lambda atoms, rng: Bussi(atoms, 0.5 * FS, TEMPERATURE, 20 * FS, rng=rng),
    ),
    "nose_hoover": (
        {"thermostat_time": 20.0},
        lambda atoms, rng: NoseHooverChainNVT(atoms, 0.5 * FS, TEMPERATURE, 20 * FS),
    ),
    "mtk_isotropic": (
        {"thermostat_time": 20.0, "barostat_time": 300.0, "pressure": 0.01},
        lambda atoms, rng: IsotropicMTKNPT(atoms, 0.5 * FS, TEMPERATURE, 0.01, 20 * FS, 300 * FS),
    ),
    "mtk": (
        {"thermostat_time": 20.0, "barostat_time": 300.0, "pressure": 0.01},
        lambda atoms, rng: MTKNPT(atoms, 0.5 * FS, TEMPERATURE, 0.01, 20 * FS, 300 * FS),
    ),
}


def word(name: str) -> pb.Integrator.ValueType:
    return pb.Integrator.Value(f"INTEGRATOR_{name.upper()}")


def set_off(atoms: Atoms, seed: int, temperature: float = TEMPERATURE) -> np.random.Generator:
    rng = np.random.default_rng(seed)
    thermalize_momenta(atoms, temperature, rng=rng)
    if not atoms.constraints:
        Stationary(atoms)
    return rng


class TestCourse:
    @pytest.mark.parametrize("name", BATHS)
    def test_is_that_of_ase(self, stub: PotentialServiceStub, server: Process, name: str) -> None:
        words, make = BATHS[name]
        steps = 200 if name in ("velocity_verlet", "langevin", "bussi", "nose_hoover") else 100
        systems = [crystal(3)] if name.startswith("mtk") else [molecule(1, 8), molecule(2, 5)]
        request = asked(
            systems,
            integrator=word(name),
            steps=steps,
            seeds=range(11, 11 + len(systems)),
            frame_every=50,
            **words,
        )
        there = courses(stub.Simulate(request), len(systems))
        with EquipotCalculator(server.address, model="tiny") as calculator:
            for index, system in enumerate(systems):
                atoms = as_atoms(system)
                atoms.calc = calculator
                make(atoms, set_off(atoms, 11 + index)).run(steps)
                assert sorted(there[index].frames) == list(range(0, steps + 1, 50))
                last = there[index].frames[steps]
                np.testing.assert_allclose(numbers(last.positions), atoms.positions, atol=1e-6)
                np.testing.assert_allclose(numbers(last.velocities), atoms.get_velocities() * FS, atol=1e-6)
                np.testing.assert_allclose(numbers(last.cell), atoms.cell[:], atol=1e-6)
                assert last.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
                assert last.kinetic_energy == pytest.approx(atoms.get_kinetic_energy(), abs=1e-6)
                assert last.temperature == pytest.approx(atoms.get_temperature(), abs=1e-3)
                moved = np.abs(atoms.positions - system.positions).max()
                assert moved > 0.05

    def test_of_a_bath_that_warms(self, stub: PotentialServiceStub, server: Process) -> None:
        system = molecule(1, 8)
        words: dict[str, Any] = {"final_temperature": 600.0, "steps": 60, "seeds": [5], "frame_every": 60}
        with EquipotCalculator(server.address, model="tiny") as calculator:
            for name in ("langevin", "bussi"):
                there = courses(
                    stub.Simulate(asked([system], integrator=word(name), **BATHS[name][0], **words))
                )
                atoms = as_atoms(system)
                atoms.calc = calculator
                integrator = BATHS[name][1](atoms, set_off(atoms, 5))
                for step in range(60):
                    now = TEMPERATURE + (600.0 - TEMPERATURE) * step / 60
                    if name == "langevin":
                        integrator.set_temperature(temperature_K=now)
                    else:
                        integrator.temp = units.kB * now
                        integrator.target_kinetic_energy = 0.5 * units.kB * now * integrator.ndof
                    integrator.run(1)
                last = there[0].frames[60]
                np.testing.assert_allclose(numbers(last.positions), atoms.positions, atol=1e-6)

    def test_with_atoms_that_stay_and_masses_and_velocities_given(
        self, stub: PotentialServiceStub, server: Process
    ) -> None:
        system = molecule(5, 6)
        fixed = np.array([1, 0, 1, 0, 0, 0], dtype=np.uint8)
        random = np.random.default_rng(2)
        masses, velocities = random.uniform(2, 40, 6), random.normal(0, 0.01, (6, 3))
        request = asked(
            [system],
            integrator=pb.INTEGRATOR_LANGEVIN,
            friction=0.02,
            steps=100,
            seeds=[3],
            fixed=fixed.tobytes(),
            masses=masses.tobytes(),
            velocities=velocities.tobytes(),
        )
        there = courses(stub.Simulate(request))[0]
        assert list(there.frames) == [100]
        atoms = as_atoms(system)
        atoms.set_masses(masses)
        atoms.set_constraint(FixAtoms(mask=fixed.astype(bool)))
        atoms.set_velocities(velocities / FS)
        with EquipotCalculator(server.address, model="tiny") as calculator:
            atoms.calc = calculator
            BATHS["langevin"][1](atoms, np.random.default_rng(3)).run(100)
        positions = numbers(there.frames[100].positions)
        np.testing.assert_allclose(positions, atoms.positions, atol=1e-6)
        np.testing.assert_array_equal(positions[fixed == 1], system.positions[fixed == 1])

    def test_does_not_depend_on_company(self, stub: PotentialServiceStub) -> None:
        words: dict[str, Any] = {"integrator": pb.INTEGRATOR_LANGEVIN, "steps": 40}
        systems = [molecule(seed, 4 + seed % 4) for seed in range(12)]
        together = courses(stub.Simulate(asked(systems, seeds=range(12), **words)), 12)[7]
        alone = courses(stub.Simulate(asked([systems[7]], seeds=[7], **words)))[0]
        assert together.frames[40].positions == alone.frames[40].positions

    def test_seeds_decide(self, stub: PotentialServiceStub) -> None:
        same = courses(stub.Simulate(asked([molecule(1)] * 3, seeds=[4, 4, 5])), 3)
        first, second, third = (one.frames[10].positions for one in same)
        assert first == second != third
        by_index = courses(stub.Simulate(asked([molecule(1)] * 2)), 2)
        assert by_index[0].frames[10].positions != by_index[1].frames[10].positions


class TestWhatIsTold:
    def test_comes_at_its_intervals(self, stub: PotentialServiceStub) -> None:
        request = asked(
            [crystal(1)], steps=11, frame_every=4, observe_every=3, token_every=5,
            frame_forces=True, frame_stress=True,
        )  # fmt: skip
        replies = list(stub.Simulate(request))
        assert replies[0].begun.model.name == "tiny"
        there = courses(replies)[0]
        assert sorted(there.frames) == [0, 4, 8, 11]
        assert sorted(there.observations) == [0, 3, 6, 9]
        assert sorted(there.tokens) == [5, 10]
        frame = there.frames[0]
        asked_once = pb.PredictRequest(
            model="tiny", structures=encode_structures(arrays([crystal(1)])),
            properties=[pb.PROPERTY_FORCES, pb.PROPERTY_STRESS],
        )  # fmt: skip
        once = stub.Predict(asked_once)
        np.testing.assert_allclose(numbers(frame.forces), numbers(once.forces), atol=1e-9)
        np.testing.assert_allclose(numbers(frame.stress), numbers(once.stress), atol=1e-9)
        seen = there.observations[0]
        assert (seen.energy, seen.kinetic_energy, seen.temperature) == (
            frame.energy, frame.kinetic_energy, frame.temperature,
        )  # fmt: skip
        cell = numbers(frame.cell)
        assert seen.volume == pytest.approx(abs(np.linalg.det(cell)))
        static = -np.trace(numbers(frame.stress)) / 3
        assert seen.pressure == pytest.approx(static + 2 / 3 * frame.kinetic_energy / seen.volume)

    @pytest.mark.parametrize("cell", [np.zeros((3, 3)), 9 * np.eye(3)])
    def test_stress_of_what_is_not_periodic_is_unknown_and_stops_nothing(
        self, stub: PotentialServiceStub, cell: np.ndarray[Any, Any]
    ) -> None:
        system = replace(molecule(1), cell=cell, pbc=np.array([cell.any(), cell.any(), False]))
        words: dict[str, Any] = {"steps": 9, "frame_every": 2, "frame_stress": True, "observe_every": 4}
        whole = courses(stub.Simulate(asked([system], token_every=3, **words)))[0]
        assert sorted(whole.frames) == [0, 2, 4, 6, 8, 9]
        assert all(np.isnan(numbers(frame.stress)).all() for frame in whole.frames.values())
        assert sorted(whole.observations) == [0, 4, 8]
        assert all(seen.volume == 0 and np.isnan(seen.pressure) for seen in whole.observations.values())
        for step, token in whole.tokens.items():
            rest = courses(stub.Simulate(asked([system], tokens=[token], **words)))[0]
            assert sorted(rest.frames) == [at for at in whole.frames if at > step]
            for at, frame in rest.frames.items():
                assert frame.positions == whole.frames[at].positions
                assert frame.velocities == whole.frames[at].velocities

    def test_momentum_is_none_and_energy_is_kept(self, stub: PotentialServiceStub) -> None:
        system = molecule(1, 8)
        request = asked([system], steps=400, timestep=0.25, observe_every=10, frame_every=100)
        there = courses(stub.Simulate(request))[0]
        masses = as_atoms(system).get_masses()
        for frame in there.frames.values():
            assert np.abs(masses @ numbers(frame.velocities)).max() < 1e-9
        total = np.array([one.energy + one.kinetic_energy for one in there.observations.values()])
        kinetic = np.array([one.kinetic_energy for one in there.observations.values()])
        assert np.ptp(total) < 0.02 * np.ptp(kinetic)

    def test_warnings(self, stub: PotentialServiceStub) -> None:
        def said(**fields: Any) -> str:
            return "\n".join(next(iter(stub.Simulate(asked([molecule(1)], **fields)))).begun.warnings)

        assert said() == ""
        assert "a time step of 4 fs is long for atoms of 1.01 u" in said(timestep=4.0)
        heavy = np.full(6, 40.0).tobytes()
        assert said(timestep=4.0, masses=heavy) == ""
        assert "less than ten steps" in said(integrator=pb.INTEGRATOR_BUSSI, thermostat_time=1.0)
        assert "no energy is conserved" in said(model="direct", level_of_theory="PBE")


class TestFailures:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"steps": 0}, "steps is 0"),
            ({"timestep": -1.0}, "timestep is -1.0"),
            ({"timestep": float("nan")}, "timestep is nan"),
            ({"temperature": -5.0}, "temperature is -5.0"),
            ({"integrator": 3, "temperature": 0.0}, "temperature is 0.0: give above 0 K for nose_hoover"),
            ({"integrator": 2, "final_temperature": -1.0}, "final_temperature is -1.0"),
            ({"integrator": 3, "final_temperature": 10.0}, "nose_hoover has none"),
            ({"integrator": 3, "friction": 0.1}, "nose_hoover has none: leave it out, or take langevin"),
            ({"integrator": 2, "friction": -0.1}, "friction is -0.1"),
            ({"integrator": 4, "thermostat_time": float("inf")}, "thermostat_time is inf"),
            ({"pressure": 1.0}, "velocity_verlet has none"),
            ({"integrator": 99}, "99 is no integrator"),
            ({"integrator": 5}, "structure 0 is not periodic"),
            ({"integrator": 3, "fixed": b"\1" + bytes(5)}, "takes no fixed atoms"),
            ({"seeds": [1, 2]}, "seeds has 2 entries for 1 structures"),
            ({"tokens": [b"", b""]}, "tokens has 2 entries for 1 structures"),
            ({"velocities": bytes(8)}, "velocities: has 8 bytes"),
            ({"drawn": b"\1\1"}, "drawn: has 2 bytes"),
            ({"masses": bytes(8)}, "masses: has 8 bytes"),
        ],
    )
    def test_of_whole_requests_name_the_field(
        self, stub: PotentialServiceStub, fields: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Simulate(asked([molecule(1)], **fields)))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (caught.value.details() or "")

    def test_no_stress_no_barostat(self, stub: PotentialServiceStub) -> None:
        request = asked([crystal(1)], model="direct", level_of_theory="PBE", integrator=pb.INTEGRATOR_MTK)
        with pytest.raises(grpc.RpcError, match="direct force head and so no stress"):
            list(stub.Simulate(request))

    def test_of_one_structure_cost_the_others_nothing(self, stub: PotentialServiceStub) -> None:
        systems = [molecule(seed, 4) for seed in range(6)]
        systems[1].positions[1] = systems[1].positions[0]
        systems[2].atomic_numbers[0] = 200
        masses = np.full(24, 12.0)
        masses[4 * 3] = 0.0
        velocities = np.zeros((24, 3))
        velocities[4 * 4 + 2, 1] = np.nan
        fixed = np.zeros(24, dtype=np.uint8)
        fixed[4 * 5 :] = 1
        request = asked(
            systems, masses=masses.tobytes(), velocities=velocities.tobytes(), fixed=fixed.tobytes()
        )
        found = courses(stub.Simulate(request), 6)
        assert not found[0].result.HasField("failure")  # type: ignore[union-attr]
        assert list(found[0].frames) == [10]
        fields = [found[index].failure.field for index in range(1, 6)]
        assert fields == ["positions", "atomic_numbers", "masses", "velocities", "fixed"]
        assert "masses holds 0 for atom 0" in found[3].failure.message
        assert [found[index].failure.index for index in range(1, 6)] == [1, 2, 3, 4, 5]

    def test_bussi_of_atoms_at_rest(self, stub: PotentialServiceStub) -> None:
        request = asked([molecule(1)], integrator=pb.INTEGRATOR_BUSSI, velocities=bytes(6 * 24))
        assert "bussi cannot rescale" in courses(stub.Simulate(request))[0].failure.message

    def test_a_trajectory_that_explodes_is_stopped(self, stub: PotentialServiceStub) -> None:
        # The hydrogen is drawn in by the others, faster than such a step can follow.
        system = molecule(1, 6)
        velocities = np.zeros((6, 3))
        velocities[4] = [0.0, 0.0, 0.4]
        request = asked(
            [system, molecule(2)],
            steps=400,
            timestep=2.0,
            temperature=0.0,
            velocities=np.concatenate([velocities * 0.999, np.zeros((6, 3))]).tobytes(),
            masses=np.concatenate([np.full(6, 0.02), np.full(6, 30.0)]).tobytes(),
            frame_every=1,
        )
        exploded, other = courses(stub.Simulate(request), 2)
        failure, steps = exploded.failure, exploded.result.steps  # type: ignore[union-attr]
        assert failure.reason == pb.FAILURE_REASON_UNSTABLE
        assert f"in step {steps + 1}" in failure.message
        assert "atom " in failure.message
        # What went before is kept, whole.
        assert sorted(exploded.frames) == list(range(steps + 1))
        assert all(np.isfinite(numbers(frame.positions)).all() for frame in exploded.frames.values())
        assert max(other.frames) == 400

    def test_a_cell_that_collapses_is_stopped(self, stub: PotentialServiceStub) -> None:
        request = asked(
            [crystal(1)],
            integrator=pb.INTEGRATOR_MTK_ISOTROPIC,
            pressure=1.0,
            barostat_time=100.0,
            steps=2000,
            frame_every=1,
        )
        there = courses(stub.Simulate(request))[0]
        assert there.failure.reason == pb.FAILURE_REASON_UNSTABLE
        assert "the cell went from" in there.failure.message
        assert 0 < max(there.frames) < 2000
        assert f"after {max(there.frames)} steps" in there.failure.message

    def test_nothing_to_do(self, stub: PotentialServiceStub) -> None:
        empty = pb.SimulateRequest(model="tiny", structures=pb.Structures(), steps=5)
        assert [reply.WhichOneof("kind") for reply in stub.Simulate(empty)] == ["begun"]


class TestTokens:
    @pytest.mark.parametrize("name", BATHS)
    def test_go_on_with_the_same_bits(self, stub: PotentialServiceStub, name: str) -> None:
        words, _ = BATHS[name]
        request = asked(
            [crystal(3)], integrator=word(name), steps=30, seeds=[9], frame_every=10, token_every=7, **words
        )
        whole = courses(stub.Simulate(request))[0]
        assert sorted(whole.tokens) == [7, 14, 21, 28]
        for token in whole.tokens.values():
            # In other company, so its batches and neighbour lists are others, too.
            again = asked(
                [crystal(3), molecule(1)] if name in ("langevin", "bussi") else [crystal(3), crystal(4)],
                integrator=word(name), steps=30, seeds=[1, 2], frame_every=10, tokens=[token, b""], **words,
            )  # fmt: skip
            rest = courses(stub.Simulate(again), 2)[0]
            for step, frame in rest.frames.items():
                assert frame == whole.frames[step]
            assert max(rest.frames) == 30

    def test_are_bound_to_the_bath(self, stub: PotentialServiceStub) -> None:
        words: dict[str, Any] = {"integrator": pb.INTEGRATOR_LANGEVIN, "steps": 6}
        token = courses(stub.Simulate(asked([molecule(1)], token_every=5, **words)))[0].tokens[5]
        hotter = asked([molecule(1)], tokens=[token], **{**words, "temperature": 300.0})
        assert "another settings" in courses(stub.Simulate(hotter))[0].failure.message
        heavier = asked([molecule(1)], tokens=[token], masses=np.full(6, 2.0).tobytes(), **words)
        assert "another structure" in courses(stub.Simulate(heavier))[0].failure.message
        other = asked([molecule(1)], tokens=[token], model="direct", level_of_theory="PBE", **words)
        assert "another model" in courses(stub.Simulate(other))[0].failure.message
        longer = asked([molecule(1)], tokens=[token], **{**words, "steps": 9})
        assert list(courses(stub.Simulate(longer))[0].frames) == [9]
