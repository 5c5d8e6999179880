"""The service over a real port: what it answers, and what it says when it cannot."""

from __future__ import annotations

from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tests.serve.conftest import Bundles, Process, ask, crystal, molecule, read

from equipot.model import kernels
from equipot.serve.config import DEFAULT_LIMITS
from equipot.serve.engine import LocalEngine, Result
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import FailureReason
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

ALL = (pb.PROPERTY_ENERGY, pb.PROPERTY_FORCES, pb.PROPERTY_STRESS)
SERVICE = "equipot.wire.v1.PotentialService"


def refusal(stub: PotentialServiceStub, request: pb.PredictRequest) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request, timeout=20)
    assert isinstance(caught.value, grpc.Call)
    return caught.value


def detail(call: grpc.Call, kind: type[Message]) -> Message:
    """The one detail of this kind in the call's rich status."""
    status = rpc_status.from_call(call)
    assert status is not None
    (packed,) = [d for d in status.details if d.Is(kind.DESCRIPTOR)]
    message = kind()
    packed.Unpack(message)
    return message


def reason(call: grpc.Call) -> str:
    info = detail(call, error_details_pb2.ErrorInfo)
    assert info.domain == "equipot"  # type: ignore[attr-defined]
    return str(info.reason)  # type: ignore[attr-defined]


def violation(call: grpc.Call) -> str:
    bad = detail(call, error_details_pb2.BadRequest)
    (found,) = bad.field_violations  # type: ignore[attr-defined]
    assert found.description
    return str(found.field)


class TestPredict:
    def test_answers_equal_the_engine_s_own(self, stub: PotentialServiceStub, bundles: Bundles) -> None:
        systems = [molecule(1), crystal(2), molecule(3, 1), crystal(4, 27)]
        answer = read(stub.Predict(ask(systems, *ALL)), systems)
        engine = LocalEngine.load(bundles.tiny, dtype="float64", device="cpu", limits=DEFAULT_LIMITS)
        assert not answer.failures
        assert answer.forces is not None
        assert answer.stress is not None
        start = 0
        for index, system in enumerate(systems):
            (graph,) = engine.prepare([system])
            (alone,) = engine.compute([graph], forces=True, stress=True)  # type: ignore[list-item]
            assert isinstance(alone, Result)
            assert alone.forces is not None
            assert alone.stress is not None
            np.testing.assert_allclose(answer.energy[index], alone.energy, rtol=0, atol=1e-10)
            np.testing.assert_allclose(
                answer.forces[start : start + system.n_atoms], alone.forces, rtol=0, atol=1e-10
            )
            np.testing.assert_allclose(answer.stress[index], alone.stress, rtol=0, atol=1e-10)
            assert np.isfinite(answer.stress[index]).all() == system.pbc.all()
            start += system.n_atoms

    def test_a_batch_equals_its_structures_one_by_one(self, stub: PotentialServiceStub) -> None:
        systems = [molecule(seed, 3 + seed) for seed in range(10)]
        together = read(stub.Predict(ask(systems)), systems)
        alone = [read(stub.Predict(ask([system])), [system]) for system in systems]
        np.testing.assert_allclose(together.energy, [a.energy[0] for a in alone], rtol=0, atol=1e-10)
        forces = np.concatenate([a.forces for a in alone if a.forces is not None])
        assert together.forces is not None
        np.testing.assert_allclose(together.forces, forces, rtol=0, atol=1e-10)

    def test_only_what_is_asked_for_comes_and_the_energy_always(self, stub: PotentialServiceStub) -> None:
        systems = [crystal(1)]
        usual = stub.Predict(ask(systems))
        assert usual.energy
        assert usual.forces
        assert not usual.stress
        energy = stub.Predict(ask(systems, pb.PROPERTY_ENERGY))
        assert energy.energy == usual.energy
        assert not energy.forces
        stress = stub.Predict(ask(systems, pb.PROPERTY_STRESS))
        assert stress.energy
        assert stress.stress
        assert not stress.forces

    def test_every_reply_names_what_computed_it(self, stub: PotentialServiceStub, server: Process) -> None:
        response = stub.Predict(ask([molecule(1)], model="direct", level_of_theory="B3LYP"))
        card = stub.GetModel(pb.GetModelRequest(model="direct"))
        assert response.model == pb.ModelReference(
            name="direct",
            digest=card.digest,
            level_of_theory="B3LYP",
            dtype="float64",
            tensor_parallel=1,
            batch_invariant=kernels.available(),
        )
        assert 0 < response.timing.compute_seconds < 20
        assert 0 <= response.timing.queue_seconds < 20
        assert (
            read(response, [molecule(1)]).energy[0]
            != read(
                stub.Predict(ask([molecule(1)], model="direct", level_of_theory="PBE")), [molecule(1)]
            ).energy[0]
        )

    def test_a_bad_structure_fails_alone(self, stub: PotentialServiceStub) -> None:
        good = [molecule(seed) for seed in range(7)]
        systems = list(good)
        systems[1] = replace(good[1], positions=np.zeros((6, 3)))
        systems[2] = replace(good[2], atomic_numbers=np.full(6, 79))
        systems[4] = molecule(4, 201)
        systems[6] = replace(good[6], atomic_numbers=np.zeros(0, dtype=int), positions=np.zeros((0, 3)))
        response = stub.Predict(ask(systems, *ALL))
        answer = read(response, systems)
        assert [(f.index, f.reason) for f in answer.failures] == [
            (1, FailureReason.INVALID_STRUCTURE),
            (2, FailureReason.UNSUPPORTED),
            (4, FailureReason.TOO_LARGE),
            (6, FailureReason.INVALID_STRUCTURE),
        ]
        for failure in answer.failures:
            assert failure.field
            assert failure.message
            assert failure.remedy
        assert "201 atoms, the limit is 200" in answer.failures[2].message
        expected = read(stub.Predict(ask(good)), good)
        assert answer.forces is not None
        assert expected.forces is not None
        starts = np.cumsum([0] + [s.n_atoms for s in systems])
        for index, system in enumerate(systems):
            failed = index in {1, 2, 4, 6}
            mine = answer.forces[starts[index] : starts[index + 1]]
            assert np.isnan(answer.energy[index]) == failed
            if failed:
                assert np.isnan(mine).all()
            else:
                np.testing.assert_allclose(answer.energy[index], expected.energy[index], rtol=0, atol=1e-10)
                theirs = expected.forces[6 * index : 6 * index + system.n_atoms]
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)

    def test_an_empty_batch_has_an_empty_answer(self, stub: PotentialServiceStub) -> None:
        response = stub.Predict(ask([]))
        assert (response.energy, response.forces, len(response.failures)) == (b"", b"", 0)
        assert response.model.name == "tiny"

    def test_structures_of_different_levels_share_batches_and_keep_their_own(
        self, stub: PotentialServiceStub
    ) -> None:
        system = molecule(1)
        calls = [
            stub.Predict.future(ask([system], model="direct", level_of_theory=level), timeout=20)
            for level in ["PBE", "B3LYP"] * 5
        ]
        energies = [read(call.result(), [system]).energy[0] for call in calls]
        assert len({round(energy, 8) for energy in energies[::2]}) == 1
        assert len({round(energy, 8) for energy in energies[1::2]}) == 1
        assert energies[0] != energies[1]


class TestRefusals:
    def test_no_structures_at_all(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, pb.PredictRequest())
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violation(call) == "structures"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("atomic_numbers", b""),
            ("positions", b"\0" * 7),
            ("cell", b"\0"),
            ("pbc", b"\1\1\2"),
            ("charge", b"\0" * 5),
            ("n_atoms", [4_000_000_000]),
            ("n_atoms", [2**32 - 1] * 250),
        ],
    )
    def test_arrays_that_do_not_fit_are_named(
        self, stub: PotentialServiceStub, field: str, value: object
    ) -> None:
        request = ask([molecule(1)])
        request.structures.ClearField(field)  # type: ignore[arg-type]
        request.structures.MergeFrom(pb.Structures(**{field: value}))  # type: ignore[arg-type]
        call = refusal(stub, request)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason(call) == "INVALID_REQUEST"
        assert violation(call).startswith("structures.")
        assert field == "n_atoms" or violation(call) == f"structures.{field}"

    def test_a_model_that_is_not_served(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, ask([molecule(1)], model="mace"))
        assert call.code() is grpc.StatusCode.NOT_FOUND
        assert "tiny@sha256:" in str(call.details())
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(pb.GetModelRequest(model="mace"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    def test_a_level_of_theory_that_must_be_named(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, ask([molecule(1)], model="direct"))
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violation(call) == "level_of_theory"
        assert "'PBE', 'B3LYP'" in str(call.details())
        call = refusal(stub, ask([molecule(1)], model="direct", level_of_theory="CCSD"))
        assert call.code() is grpc.StatusCode.NOT_FOUND

    def test_stress_of_a_model_that_has_none(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, ask([crystal(1)], *ALL, model="direct", level_of_theory="PBE"))
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violation(call) == "properties"

    @pytest.mark.parametrize("value", [0, 4, -1])
    def test_properties_that_nobody_knows(self, stub: PotentialServiceStub, value: int) -> None:
        call = refusal(stub, ask([molecule(1)], value))  # type: ignore[arg-type]
        assert violation(call) == "properties"

    def test_more_than_one_request_may_hold(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, ask([molecule(1, 1)] * 301))
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason(call) == "OVER_LIMIT"
        assert "301 structures, the limit is 300" in str(call.details())
        call = refusal(stub, ask([molecule(1, 190)] * 30))
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "5700 atoms, the limit is 5000" in str(call.details())

    def test_a_message_over_the_limit(self, stub: PotentialServiceStub) -> None:
        call = refusal(stub, pb.PredictRequest(structures=pb.Structures(positions=bytes(2 * 2**20))))
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_bytes_that_are_no_message(self, channel: grpc.Channel) -> None:
        predict = channel.unary_unary(f"/{SERVICE}/Predict", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            predict(b"\xff\xff\xff", timeout=20)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason(caught.value) == "INVALID_REQUEST"

    def test_a_deadline_too_short(self, stub: PotentialServiceStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(ask([crystal(1, 190)] * 20), timeout=0.001)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stub.Predict(ask([molecule(1)]), timeout=20)


class TestAround:
    def test_models_describe_themselves(self, stub: PotentialServiceStub, bundles: Bundles) -> None:
        tiny, direct = stub.ListModels(pb.ListModelsRequest()).models
        assert tiny == stub.GetModel(pb.GetModelRequest())
        assert (tiny.name, tiny.is_default, tiny.force_mode, tiny.has_stress) == (
            "tiny",
            True,
            "conservative",
            True,
        )
        assert (direct.name, direct.is_default, direct.force_mode, direct.has_stress) == (
            "direct",
            False,
            "direct",
            False,
        )
        assert list(direct.levels_of_theory) == ["PBE", "B3LYP"]
        assert list(tiny.elements) == [1, 6, 8]
        assert tiny.cutoff == 4.0
        assert tiny.dtype == "float64"
        assert tiny.n_parameters > 1_000
        assert tiny.card_json == (bundles.tiny / "model.json").read_text()
        assert tiny.limits == pb.Limits(
            max_atoms_per_structure=200,
            max_structures_per_request=300,
            max_atoms_per_request=5_000,
            max_message_bytes=2**20,
        )

    @pytest.mark.parametrize("service", ["", SERVICE])
    def test_health(self, channel: grpc.Channel, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == 1

    def test_reflection_names_the_services(self, channel: grpc.Channel) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in reply.list_services_response.service}
        others = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert names == {SERVICE, "inference.GRPCInferenceService", *others}

    def test_metrics_count_what_happens(self, stub: PotentialServiceStub, server: Process) -> None:
        def counts() -> list[float]:
            return [
                server.sample("equipot_requests_total", model="tiny", outcome="ok"),
                server.sample("equipot_requests_total", model="", outcome="not_served"),
                server.sample("equipot_structures_total", model="tiny", outcome="ok"),
                server.sample("equipot_structures_total", model="tiny", outcome="unsupported"),
                server.sample("equipot_atoms_total", model="tiny"),
                server.sample("equipot_request_seconds_count", model="tiny"),
                server.sample("equipot_compute_seconds_count", model="tiny"),
                server.sample("equipot_wait_seconds_count", model="tiny"),
            ]

        before = counts()
        bad = replace(molecule(1), atomic_numbers=np.full(6, 79))
        stub.Predict(ask([molecule(1), bad, molecule(2)]))
        refusal(stub, ask([molecule(1)], model="x" * 1_000))
        assert [after - was for after, was in zip(counts(), before, strict=True)] == [1, 1, 2, 1, 12, 1, 1, 2]
        assert server.sample("equipot_in_flight_requests") == 0
        assert server.sample("equipot_queue_edges") == 0
        digest = stub.GetModel(pb.GetModelRequest()).digest
        assert server.sample("equipot_model_info", model="tiny", digest=digest, dtype="float64") == 1
        assert "xxxx" not in server.scrape()
