"""How sure answers are, over a real port: spreads, intervals, domains, and what a model cannot tell."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from tests.serve.conftest import Process, ask, molecule, running, write_tiny
from tests.serve.strange import STRICT, is_outside, thrown_together
from tests.serve.test_inference_protocol import as_tensors, request, tensor, texts

from equipot.cli.main import main
from equipot.client import (
    AsyncClient,
    Client,
    EquipotCalculator,
    FailureReason,
    InvalidRequest,
    MotionFrame,
    Predictions,
    Uncertainty,
)
from equipot.client.open_files import OpenFiles
from equipot.client.recording import Recording
from equipot.model.batch import System
from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.certainty import UncertaintyArrays
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Served:
    """A server of an ensemble, its members alone, and a model that is calibrated but alone."""

    process: Process

    @property
    def address(self) -> str:
        return self.process.address


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("certainty")
    bundles = [
        write_tiny(home / "three", "three", seed=1, more_seeds=SEEDS[1:], uncertain=True),
        write_tiny(home / "alone", "alone", seed=1, uncertain=True),
        *(write_tiny(home / f"m{seed}", f"m{seed}", seed=seed) for seed in SEEDS),
    ]
    words = ["--dtype", "float64", "--threads", 1, "--jobs", home / "jobs"]
    with running(*bundles, *words, stderr=home / "log") as process:
        yield Served(process)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address, model="three") as client:
        yield client


def atoms_of(system: System) -> Atoms:
    return Atoms(numbers=system.atomic_numbers, positions=system.positions, pbc=False)


@pytest.fixture
def frames() -> list[Atoms]:
    return [atoms_of(molecule(seed, 4 + seed % 6)) for seed in range(3000, 3012)]


def squeezed() -> Atoms:
    return Atoms("OHH", [(0, 0, 0), (0.95, 0.1, 0), (0.1, 0.45, 0)])


def test_the_page_is_told_the_same(served: Served, client: Client, frames: list[Atoms]) -> None:
    pair = [frames[0], squeezed()]
    asked = client.predict(pair, uncertainty=True)
    told = [asked[index].uncertainty for index in range(2)]
    structures = [
        {
            "atomic_numbers": atoms.numbers.tolist(),
            "positions": atoms.positions.tolist(),
            "cell": [[0.0] * 3] * 3,
            "pbc": [False] * 3,
        }
        for atoms in pair
    ]
    body = json.dumps({"model": "three", "structures": structures, "uncertainty": True}).encode()
    request = urllib.request.Request(f"{served.process.page}api/predict", body, {"X-Equipot-Page": "1"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        known, odd = (result["uncertainty"] for result in json.load(reply)["results"])
    assert known["members"] == 3
    for one, other in zip((known, odd), told, strict=True):
        assert other is not None
        assert other.forces_interval is not None
        assert one["energy_spread"] == pytest.approx(other.energy_spread, rel=1e-9)
        np.testing.assert_allclose(one["forces_interval"], other.forces_interval, rtol=1e-9)
    assert known["outside"] is None
    assert "apart" in odd["outside"]["reason"]


def close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, err_msg: str = "") -> None:
    assert actual is not None
    assert expected is not None
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=err_msg)


def known(found: Predictions) -> UncertaintyArrays:
    assert found.uncertainty is not None
    return found.uncertainty


def test_the_ensemble_is_what_numpy_makes_of_its_members(client: Client, frames: list[Atoms]) -> None:
    found = client.predict(frames, stress=False, uncertainty=True)
    alone = [client.predict(frames, model=f"m{seed}") for seed in SEEDS]
    energies = np.stack([one.energy for one in alone])
    forces = np.stack([one.forces for one in alone if one.forces is not None])
    certainty = known(found)
    assert certainty.members == 3
    assert certainty.not_available == ()
    close(found.energy, energies.mean(0), rtol=1e-12)
    close(found.forces, forces.mean(0), atol=1e-10)
    close(certainty.energy_spread, energies.std(0), rtol=1e-6)
    by_component = forces.std(0)
    close(certainty.forces_spread, np.sqrt((by_component**2).sum(1)), rtol=1e-6)


def test_intervals_are_the_card_s_quantiles_of_spreads(client: Client, frames: list[Atoms]) -> None:
    found = client.predict(frames, uncertainty=Uncertainty(coverage=0.8))
    certainty = known(found)
    assert certainty.coverage == 0.8
    level = client.model().card["uncertainty"]["calibration"]["by_level_of_theory"]["PBE"]
    n_atoms = found.n_atoms
    assert certainty.energy_spread is not None
    assert certainty.forces_spread is not None
    energy = (certainty.energy_spread / n_atoms + level["energy"]["offset"]) * level["energy"]["values"][79]
    close(certainty.energy_interval, energy * n_atoms, rtol=1e-12)
    forces = (certainty.forces_spread + level["forces"]["offset"]) * level["forces"]["values"][79]
    close(certainty.forces_interval, forces, rtol=1e-12)
    wider = known(client.predict(frames, uncertainty=Uncertainty(coverage=0.95)))
    assert (np.asarray(wider.energy_interval) > np.asarray(certainty.energy_interval)).all()


def test_who_does_not_ask_gets_the_same_numbers_and_nothing_more(served: Served, frames: list[Atoms]) -> None:
    system = molecule(3000)
    with grpc.insecure_channel(served.address) as channel:
        stub = PotentialServiceStub(channel)
        plain = stub.Predict(ask([system], model="three"), timeout=20)
        asked = stub.Predict(ask([system], model="three", uncertainty=pb.UncertaintyOptions()), timeout=20)
    assert not plain.HasField("uncertainty")
    assert asked.uncertainty.coverage == 0.9
    assert (plain.energy, plain.forces) == (asked.energy, asked.forces)


def test_what_a_model_cannot_tell_is_named_and_no_error(client: Client, frames: list[Atoms]) -> None:
    plain = client.predict(frames, model="m1", uncertainty=True)
    assert not plain.failures
    words = " ".join(known(plain).not_available)
    assert "no ensemble" in words
    assert "not calibrated" in words
    assert "where its training ended" in words
    one = plain[0].uncertainty
    assert one is not None
    assert (one.energy_spread, one.energy_interval, one.domain) == (None, None, None)
    alone = known(client.predict(frames, model="alone", uncertainty=True))
    assert alone.energy_spread is None
    assert len(alone.not_available) == 1
    assert alone.energy_interval is not None
    assert np.ptp(alone.energy_interval / np.array([len(frame) for frame in frames])) < 1e-12
    assert alone.domain_score is not None


def test_energy_alone_has_no_spread_of_forces(client: Client, frames: list[Atoms]) -> None:
    certainty = known(client.predict(frames, forces=False, uncertainty=True))
    assert certainty.energy_spread is not None
    assert certainty.energy_interval is not None
    assert certainty.forces_spread is None
    assert certainty.forces_interval is None


def test_strange_structures_are_answered_flagged_or_refused_as_asked(
    client: Client, served: Served, frames: list[Atoms]
) -> None:
    unknown = Atoms("Xe", [(0, 0, 0)])
    broken = Atoms("H2", [(0, 0, 0), (np.nan, 0, 0)])
    batch = [frames[0], squeezed(), unknown, broken, frames[1]]
    before = served.process.sample("equipot_structures_outside_domain_total", model="three")
    found = client.predict(batch, uncertainty=True)
    assert [failure.index for failure in found.failures] == [2, 3]
    certainty = known(found)
    (outside,) = certainty.outside
    assert outside.index == 1
    assert outside.atom in (0, 1, 2)
    assert "Å apart; the closest in training were" in outside.reason
    assert np.isfinite(found.energy[1])
    score = certainty.domain_score
    assert score is not None
    assert np.isnan(score[[2, 3]]).all()
    assert (score[[0, 4]] <= 1).all()
    assert score[1] >= 1
    assert certainty.forces_spread is not None
    assert len(certainty.forces_spread) == sum(map(len, batch))
    assert np.isnan(certainty.forces_spread[-len(frames[1]) - 3 : -len(frames[1])]).all()
    one = found[1].uncertainty
    assert one is not None
    assert one.domain is not None
    assert one.domain.outside
    assert one.domain.atom == outside.atom
    inside = found[0].uncertainty
    assert inside is not None
    assert inside.domain is not None
    assert not inside.domain.outside

    refused = client.predict(batch, uncertainty=STRICT)
    assert [failure.index for failure in refused.failures] == [1, 2, 3]
    assert refused.failures[0].reason is FailureReason.OUTSIDE_DOMAIN
    assert "closest in training" in refused.failures[0].message
    assert np.isnan(refused.energy[1])
    assert refused.energy[4] == found.energy[4]
    assert known(refused).outside == ()
    explained = client.explain(batch, uncertainty=STRICT)
    assert [failure.index for failure in explained.failures] == [1, 2, 3]
    after = served.process.sample("equipot_structures_outside_domain_total", model="three")
    assert after == before + 2


@pytest.mark.parametrize("coverage", [1.0, 0.995, -0.1, float("nan"), 1e9])
def test_a_coverage_that_nothing_has_is_refused(client: Client, frames: list[Atoms], coverage: float) -> None:
    with pytest.raises(InvalidRequest, match="coverage is") as caught:
        client.predict(frames, uncertainty=Uncertainty(coverage=coverage))
    assert caught.value.field == "uncertainty.coverage"


def test_parts_and_clients_agree(served: Served, client: Client, frames: list[Atoms]) -> None:
    batch = [*frames[:5], Atoms(), squeezed(), *frames[5:], squeezed()]
    whole = client.predict(batch, uncertainty=True)
    with Client(served.address, model="three", atoms_per_request=12) as small:
        parts = small.predict(batch, uncertainty=True)
        one_by_one = list(small.predict_iter(batch, uncertainty=True))

    async def by_asyncio() -> Predictions:
        async with AsyncClient(served.address, model="three") as other:
            return await other.predict(batch, uncertainty=True)

    first = known(whole)
    for other in (parts, asyncio.run(by_asyncio())):
        second = known(other)
        for name in ("energy_spread", "forces_spread", "energy_interval", "forces_interval", "domain_score"):
            close(getattr(second, name), getattr(first, name), rtol=1e-6, err_msg=name)
        assert [(one.index, one.atom) for one in second.outside] == [
            (one.index, one.atom) for one in first.outside
        ]
    assert [one.index for one in first.outside] == [6, 14]
    flagged = [
        index
        for index, one in enumerate(one_by_one)
        if one.uncertainty is not None
        and one.uncertainty.domain is not None
        and one.uncertainty.domain.outside
    ]
    assert flagged == [6, 14]


def test_steps_of_a_session_tell_it_too(client: Client, frames: list[Atoms]) -> None:
    atoms = frames[3]
    with client.session(atoms, uncertainty=True) as session:
        for shift in (0.0, 0.02, 0.04):
            moved = atoms.copy()
            moved.positions[0] += shift
            step, call = (
                known(session.predict(moved.positions)),
                known(client.predict(moved, uncertainty=True)),
            )
            close(step.energy_spread, call.energy_spread, rtol=1e-6)
            close(step.forces_interval, call.forces_interval, rtol=1e-6)
            close(step.domain_score, call.domain_score, rtol=1e-6)
        with_plain = session.predict(atoms.positions, forces=False)
        assert known(with_plain).forces_spread is None
    with client.session(atoms) as plain:
        assert plain.predict(atoms.positions).uncertainty is None


def test_a_relaxed_structure_is_told_where_it_came_to_rest(client: Client, frames: list[Atoms]) -> None:
    found = client.relax([frames[0], squeezed()], steps=3, uncertainty=True)
    for frame, one in zip([frames[0], squeezed()], found, strict=True):
        rested = frame.copy()
        rested.positions = one.positions
        call = client.predict(rested, uncertainty=True)[0].uncertainty
        assert one.uncertainty is not None
        assert call is not None
        assert one.uncertainty.energy_spread == pytest.approx(call.energy_spread, rel=1e-6)
        close(one.uncertainty.forces_spread, call.forces_spread, rtol=1e-6)
        assert one.uncertainty.domain is not None
        assert call.domain is not None
        assert one.uncertainty.domain.score == pytest.approx(call.domain.score, rel=1e-6)
    assert client.relax([frames[0]], steps=1)[0].uncertainty is None


def test_frames_of_dynamics_tell_it_in_calls_and_jobs(client: Client, frames: list[Atoms]) -> None:
    moving = [frames[3], thrown_together(frames[0])]
    how: dict[str, Any] = {"steps": 12, "frame_every": 4, "temperature": 50.0, "seed": 1, "uncertainty": True}
    found = client.simulate(moving, **how)
    job = client.jobs.simulate(moving, **how)
    of_job = [(one.index, one.found) for one in client.jobs.attach(job.id)]
    flagged = 0
    for index, (frame, trajectory) in enumerate(zip(moving, found, strict=True)):
        kept = [told for place, told in of_job if place == index and isinstance(told, MotionFrame)]
        assert [one.step for one in kept] == [one.step for one in trajectory.frames] == [0, 4, 8, 12]
        for here, there in zip(trajectory.frames, kept, strict=True):
            call = client.predict(Atoms(frame.numbers, here.positions), uncertainty=True)[0].uncertainty
            assert call is not None
            assert call.domain is not None
            for one in (here.uncertainty, there.uncertainty):
                assert one is not None
                assert one.energy_interval == pytest.approx(call.energy_interval, rel=1e-6)
                close(one.forces_spread, call.forces_spread, rtol=1e-6)
                assert one.domain is not None
                assert one.domain.score == pytest.approx(call.domain.score, rel=1e-6)
                assert (one.domain.outside, one.domain.atom) == (call.domain.outside, call.domain.atom)
            flagged += call.domain.outside
    # The one that flies leaves the domain on its way.
    assert flagged
    assert client.simulate(frames[0], steps=1)[0].frames[0].uncertainty is None


def test_what_leaves_the_domain_on_its_way_is_stopped_there(client: Client, frames: list[Atoms]) -> None:
    flying = thrown_together(frames[0])
    (course,) = client.simulate([flying], steps=40, frame_every=1, uncertainty=STRICT)
    ended = course.ended
    assert ended is not None
    assert ended.failure is not None
    assert ended.failure.reason is FailureReason.OUTSIDE_DOMAIN
    assert ended.failure.message.startswith(f"after {ended.steps} steps: it is outside")
    assert [frame.step for frame in course.frames] == list(range(ended.steps + 1))
    assert not is_outside(client, flying, course.frames[-1].positions)
    assert is_outside(client, flying, ended.positions)
    job = client.jobs.relax([frames[0], squeezed()], fmax=1e-4, steps=100, uncertainty=STRICT)
    by_job = {one.index: one.relaxed for one in client.jobs.attach(job.id)}
    for found in (client.relax([frames[0], squeezed()], fmax=1e-4, steps=100, uncertainty=STRICT), by_job):
        assert found[1].failure is not None
        assert found[1].steps == 0
        one = found[0]
        assert one.failure is not None
        assert one.failure.reason is FailureReason.OUTSIDE_DOMAIN
        assert one.steps > 0
        assert one.failure.message.startswith(f"after {one.steps} steps: it is outside")
        assert is_outside(client, frames[0], one.positions)


def test_the_inference_protocol_has_it_as_tensors(served: Served, frames: list[Atoms]) -> None:
    systems = [molecule(3000), molecule(3001, 5)]
    systems.append(replace(systems[0], positions=0.5 * systems[0].positions))
    names = ("energy_spread", "energy_interval", "forces_spread", "forces_interval", "domain_score")
    with grpc.insecure_channel(served.address) as channel:
        stub, ours = GRPCInferenceServiceStub(channel), PotentialServiceStub(channel)
        wanted = request(as_tensors(systems), *names, "outside_domain", model="three")
        wanted.parameters["coverage"].string_param = "0.5"
        theirs = stub.ModelInfer(wanted, timeout=20)
        options = pb.UncertaintyOptions(coverage=0.5)
        expected = ours.Predict(ask(systems, model="three", uncertainty=options), timeout=20).uncertainty
        for name in names:
            close(tensor(theirs, name).ravel(), np.frombuffer(getattr(expected, name)), rtol=1e-6)
        (outside,) = expected.outside
        assert texts(theirs, "outside_domain") == ["", "", outside.reason]
        wanted.parameters["refuse_outside"].bool_param = True
        refused = stub.ModelInfer(wanted, timeout=20)
        assert "outside what the model was trained on" in texts(refused)[2]
        listed = {
            name: {one.name for one in stub.ModelMetadata(oip.ModelMetadataRequest(name=name)).outputs}
            for name in ("three", "m1")
        }
        assert listed["three"] - listed["m1"] == {*names, "outside_domain"}
        plain = stub.ModelInfer(request(as_tensors(systems), "energy_spread", model="m1"), timeout=20)
        assert np.isnan(tensor(plain, "energy_spread")).all()
        assert "no ensemble" in plain.parameters["not_available"].string_param
        for name, value in (("coverage", "much"), ("coverage", "2"), ("refuse_outside", "yes")):
            wrong = request(as_tensors(systems), "energy", model="three")
            wrong.parameters[name].string_param = value
            with pytest.raises(grpc.RpcError, match=name):
                stub.ModelInfer(wrong, timeout=20)


def test_relax_and_md_write_it(
    served: Served,
    frames: list[Atoms],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write("in.extxyz", [frames[3], thrown_together(frames[0])])
    words = ["in.extxyz", "--address", served.address, "--model", "three", "--uncertainty"]
    main(["relax", *words, "--steps", "3"])
    main(["relax", *words, "--steps", "3", "--job", "--out", "job.extxyz"])
    for name in ("in-relaxed.extxyz", "job.extxyz"):
        for frame in read(name, ":"):
            assert frame.info["equipot_energy_interval"] > 0
            assert frame.arrays["equipot_forces_spread"].shape == (len(frame),)
    how = ["--steps", "30", "--frame-every", "3", "--observe-every", "1"]
    assert main(["md", *words, *how]) == 0
    said = capsys.readouterr().out
    assert "outside the training domain: " in said
    assert "structure 1: temperature" in said
    assert any("equipot_outside_domain" in frame.info for frame in read("in-md-1.extxyz", ":"))
    assert main(["md", *words, *how, "--refuse-outside", "--out", "strict.extxyz"]) == 1
    assert "structure 1: positions: after" in capsys.readouterr().out
    last = read("strict-1.extxyz", -1)
    assert "it is outside" in last.info["equipot_failure"]
    assert (last.info["equipot_step"] < 30, last.calc) == (True, None)
    with Client(served.address, model="three") as client:
        assert is_outside(client, last, last.positions)
    count = served.process.sample("equipot_structures_total")
    # What failed is not tried once more, and said again.
    assert main(["md", *words, *how, "--refuse-outside", "--out", "strict.extxyz", "--resume"]) == 1
    assert "structure 1: positions: after" in capsys.readouterr().out
    assert served.process.sample("equipot_structures_total") == count
    # What has a token may go on, if its caller thinks better of his border.
    atoms = read("in.extxyz", 1)
    with OpenFiles() as files, Client(served.address, model="three") as client:
        kept = Recording([Path("on.traj")], files, timestep=1.0, resume=False)
        for _, told in client.simulate_iter(atoms, steps=30, token_every=2, uncertainty=STRICT):
            kept.take(0, atoms, told, "", 0)
    write("one.extxyz", atoms)
    assert "it is outside" in read("on.traj").info["equipot_failure"]
    assert main(["md", "one.extxyz", *words[1:], *how, "--out", "on.traj", "--resume"]) == 0
    assert [frame.info["equipot_step"] for frame in read("on.traj", "-2:")] == [27, 30]


def test_ase_s_calculator_keeps_it(served: Served, frames: list[Atoms]) -> None:
    atoms, strange = frames[2].copy(), squeezed()
    with EquipotCalculator(served.address, model="three", uncertainty=True) as calculator:
        for _ in range(3):  # by a call, then by a session
            atoms.positions[0, 0] += 0.01
            atoms.calc = calculator
            atoms.get_forces()
            names = {"energy_spread", "energy_interval", "forces_spread", "forces_interval", "domain_score"}
            assert names <= calculator.results.keys()
            assert calculator.results["forces_spread"].shape == (len(atoms),)
            assert "equipot_outside_domain" not in atoms.info
        strange.calc = calculator
        strange.get_potential_energy()
        assert "Å apart" in strange.info["equipot_outside_domain"]
        strange.positions = strange.positions * 4
        strange.info["equipot_outside_domain"] = "of another geometry"
        strange.get_potential_energy()
        assert strange.info.get("equipot_outside_domain") != "of another geometry"
    with EquipotCalculator(served.address, model="three") as plain:
        atoms.calc = plain
        atoms.get_potential_energy()
        assert "energy_spread" not in plain.results


def test_the_command_line_writes_and_lists_it(
    served: Served, frames: list[Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.extxyz", tmp_path / "out.extxyz"
    write(source, [*frames[:3], squeezed()])
    words = ["predict", str(source), "--address", served.address, "--out", str(out), "--model", "three"]
    assert main([*words, "--uncertainty", "--coverage", "0.5"]) == 0
    assert "outside the training domain: 1" in capsys.readouterr().out
    written = read(out, ":")
    with Client(served.address, model="three") as client:
        expected = client.predict([*frames[:3], squeezed()], uncertainty=Uncertainty(coverage=0.5))
    for frame, one in zip(written, expected, strict=True):
        certainty = one.uncertainty
        assert certainty is not None
        assert certainty.domain is not None
        assert frame.info["equipot_energy_spread"] == pytest.approx(certainty.energy_spread, rel=1e-6)
        assert frame.info["equipot_energy_interval"] == pytest.approx(certainty.energy_interval, rel=1e-6)
        close(frame.arrays["equipot_forces_interval"], certainty.forces_interval, rtol=1e-6, atol=1e-7)
        assert ("equipot_outside_domain" in frame.info) == certainty.domain.outside
    assert main(words) == 0
    assert "equipot_energy_spread" not in read(out, 0).info
    capsys.readouterr()
    assert main([*words[:-1], "m1", "--uncertainty"]) == 0
    assert "not available: spread: the model is one potential" in capsys.readouterr().out
    assert main(["models", "--address", served.address]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert "certain" in listed
    with Client(served.address) as client:
        infos = {info.name: info for info in client.models()}
    assert (infos["three"].members, infos["three"].is_calibrated, infos["three"].has_domain) == (
        3,
        True,
        True,
    )
    assert (infos["m1"].members, infos["m1"].is_calibrated, infos["m1"].has_domain) == (1, False, False)
