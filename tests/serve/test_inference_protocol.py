"""The Open Inference Protocol: the same answers and refusals as our own service, in tensors."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from equipot.model.batch import System
from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Process, arrays, ask, crystal, molecule, read

Tensor = oip.ModelInferRequest.InferInputTensor

DATATYPES = {"int64": "INT64", "int32": "INT32", "float64": "FP64", "float32": "FP32", "bool": "BOOL"}


@pytest.fixture
def oip_stub(channel: grpc.Channel) -> GRPCInferenceServiceStub:
    return GRPCInferenceServiceStub(channel)


def request(
    tensors: dict[str, NDArray[np.generic]],
    *outputs: str,
    model: str = "tiny",
    version: str = "",
    id: str = "",
) -> oip.ModelInferRequest:
    return oip.ModelInferRequest(
        model_name=model,
        model_version=version,
        id=id,
        inputs=[
            Tensor(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)
            for name, array in tensors.items()
        ],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[array.tobytes() for array in tensors.values()],
    )


def as_tensors(systems: Sequence[System]) -> dict[str, NDArray[np.generic]]:
    flat = arrays(systems)
    return {
        "n_atoms": flat.n_atoms,
        "atomic_numbers": flat.atomic_numbers,
        "positions": flat.positions,
        "cell": flat.cell,
        "pbc": flat.pbc,
        "charge": flat.charge,
    }


def tensor(response: oip.ModelInferResponse, name: str) -> NDArray[np.float64]:
    place = [output.name for output in response.outputs].index(name)
    output = response.outputs[place]
    assert output.datatype == "FP64"
    return np.frombuffer(response.raw_output_contents[place]).reshape(tuple(output.shape))


def texts(response: oip.ModelInferResponse, name: str = "error") -> list[str]:
    raw = response.raw_output_contents[[output.name for output in response.outputs].index(name)]
    found = []
    while raw:
        (length,) = struct.unpack("<I", raw[:4])
        found.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return found


def refusal(stub: GRPCInferenceServiceStub, wrong: oip.ModelInferRequest) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(wrong)
    assert isinstance(caught.value, grpc.Call)
    return caught.value


class TestAnswers:
    def test_are_those_of_our_own_service(
        self, oip_stub: GRPCInferenceServiceStub, stub: PotentialServiceStub
    ) -> None:
        systems = [molecule(1), crystal(2), molecule(3, 9)]
        ours = read(stub.Predict(ask(systems, pb.PROPERTY_FORCES, pb.PROPERTY_STRESS, model="tiny")), systems)
        theirs = oip_stub.ModelInfer(request(as_tensors(systems), "stress", "energy", "forces"))
        assert [output.name for output in theirs.outputs] == ["stress", "energy", "forces"]
        np.testing.assert_array_equal(tensor(theirs, "energy"), ours.energy)
        np.testing.assert_array_equal(tensor(theirs, "forces"), ours.forces)
        np.testing.assert_array_equal(tensor(theirs, "stress"), ours.stress)

    def test_typed_contents_say_the_same_as_raw_ones(self, oip_stub: GRPCInferenceServiceStub) -> None:
        system = crystal(4)
        raw = oip_stub.ModelInfer(request(as_tensors([system]), "energy", "forces"))
        contents = oip.InferTensorContents
        n_atoms = len(system.positions)
        typed = oip.ModelInferRequest(
            model_name="tiny",
            inputs=[
                Tensor(
                    name="atomic_numbers",
                    datatype="INT8",
                    shape=[n_atoms],
                    contents=contents(int_contents=system.atomic_numbers.tolist()),
                ),
                Tensor(
                    name="positions",
                    datatype="FP64",
                    shape=[n_atoms, 3],
                    contents=contents(fp64_contents=system.positions.ravel().tolist()),
                ),
                Tensor(
                    name="cell",
                    datatype="FP64",
                    shape=[3, 3],
                    contents=contents(fp64_contents=system.cell.ravel().tolist()),
                ),
                Tensor(
                    name="pbc",
                    datatype="BOOL",
                    shape=[1, 3],
                    contents=contents(bool_contents=[True] * 3),
                ),
            ],
        )
        answer = oip_stub.ModelInfer(typed)
        assert [output.name for output in answer.outputs] == ["energy", "forces"]
        np.testing.assert_array_equal(tensor(answer, "energy"), tensor(raw, "energy"))
        np.testing.assert_array_equal(tensor(answer, "forces"), tensor(raw, "forces"))

    def test_name_what_computed_them(
        self, oip_stub: GRPCInferenceServiceStub, stub: PotentialServiceStub
    ) -> None:
        digest = stub.GetModel(pb.GetModelRequest(model="tiny")).digest
        wanted = request(as_tensors([molecule(1)]), version=digest, id="seven")
        answer = oip_stub.ModelInfer(wanted)
        assert (answer.id, answer.model_name, answer.model_version) == ("seven", "tiny", digest)
        assert answer.parameters["level_of_theory"].string_param == "PBE"
        assert answer.parameters["dtype"].string_param == "float64"

    def test_a_level_of_theory_is_a_parameter(self, oip_stub: GRPCInferenceServiceStub) -> None:
        energies = []
        for level in ("PBE", "B3LYP"):
            wanted = request(as_tensors([molecule(1)]), "energy", model="direct")
            wanted.parameters["level_of_theory"].string_param = level
            energies.append(float(tensor(oip_stub.ModelInfer(wanted), "energy")[0]))
        assert energies[0] != energies[1]

    def test_a_bad_structure_costs_the_others_nothing(self, oip_stub: GRPCInferenceServiceStub) -> None:
        bad = molecule(2)
        bad.positions[1] = bad.positions[0]
        alone = oip_stub.ModelInfer(request(as_tensors([molecule(1)]), "energy"))
        answer = oip_stub.ModelInfer(request(as_tensors([molecule(1), bad]), "energy"))
        energy = tensor(answer, "energy")
        assert energy[0] == tensor(alone, "energy")[0]
        assert np.isnan(energy[1])
        first, second = texts(answer)
        assert first == ""
        assert second.startswith("positions: ")
        assert "error" not in [output.name for output in alone.outputs]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"positions": np.zeros((6, 2))}, "positions: has the shape [6, 2], expected [N, 3] = [6, 3]"),
            ({"positions": np.zeros((6, 3), dtype=np.int32)}, "positions: has the datatype 'INT32'"),
            ({"atomic_numbers": np.full(6, 2**40)}, "atomic_numbers: holds 1099511627776"),
            ({"n_atoms": np.array([7])}, "atomic_numbers: has the shape [6], expected [N] = [7]"),
            ({"n_atoms": np.array([-1, 7])}, "n_atoms: holds -1"),
            ({"velocities": np.zeros((6, 3))}, "'velocities' is no input"),
        ],
    )
    def test_name_the_tensor(
        self, oip_stub: GRPCInferenceServiceStub, change: dict[str, NDArray[np.generic]], words: str
    ) -> None:
        call = refusal(oip_stub, request({**as_tensors([molecule(1)]), **change}))
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (call.details() or "")

    @pytest.mark.parametrize("name", ["atomic_numbers", "positions"])
    def test_a_missing_tensor(self, oip_stub: GRPCInferenceServiceStub, name: str) -> None:
        tensors = as_tensors([molecule(1)])
        del tensors[name]
        assert f"{name}: is missing" in (refusal(oip_stub, request(tensors)).details() or "")

    def test_contents_that_do_not_fit_their_shape(self, oip_stub: GRPCInferenceServiceStub) -> None:
        wrong = request(as_tensors([molecule(1)]))
        wrong.raw_input_contents[2] = wrong.raw_input_contents[2][:-1]
        assert "positions: has 143 bytes" in (refusal(oip_stub, wrong).details() or "")

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ([1] * 65, "atomic_numbers: has 65 axes, expected [N]"),
            (
                [0, 2**62, 2**62],
                f"atomic_numbers: has the shape [0, {2**62}, {2**62}]; give the real lengths",
            ),
            ([0, 7], "atomic_numbers: has the shape [0, 7], expected [N]"),
        ],
    )
    @pytest.mark.parametrize("typed", [False, True])
    def test_shapes_that_no_array_has(
        self, oip_stub: GRPCInferenceServiceStub, shape: list[int], words: str, typed: bool
    ) -> None:
        numbers = [1] * (0 not in shape)
        wrong = request({"atomic_numbers": np.array(numbers, dtype=np.int32), "positions": np.zeros((1, 3))})
        wrong.inputs[0].shape[:] = shape
        if typed:
            del wrong.raw_input_contents[:]
            wrong.inputs[0].contents.int_contents.extend(numbers)
            wrong.inputs[1].contents.fp64_contents.extend([0.0] * 3)
        call = refusal(oip_stub, wrong)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (call.details() or "")

    def test_an_output_that_is_none(self, oip_stub: GRPCInferenceServiceStub) -> None:
        call = refusal(oip_stub, request(as_tensors([molecule(1)]), "dipole"))
        assert "'dipole' is no output; the outputs are energy, forces, stress, error," in (
            call.details() or ""
        )

    def test_a_model_that_is_not_served(self, oip_stub: GRPCInferenceServiceStub) -> None:
        call = refusal(oip_stub, request(as_tensors([molecule(1)]), model="other"))
        assert call.code() is grpc.StatusCode.NOT_FOUND

    def test_stress_of_a_model_without(self, oip_stub: GRPCInferenceServiceStub) -> None:
        wanted = request(as_tensors([crystal(1)]), "stress", model="direct")
        assert refusal(oip_stub, wanted).code() is grpc.StatusCode.INVALID_ARGUMENT


class TestMetadata:
    def test_says_what_infer_takes_and_gives(self, oip_stub: GRPCInferenceServiceStub) -> None:
        model = oip_stub.ModelMetadata(oip.ModelMetadataRequest(name="direct"))
        inputs = {one.name: (one.datatype, list(one.shape)) for one in model.inputs}
        assert inputs["positions"] == ("FP64", [-1, 3])
        assert {one.name for one in model.outputs} == {"energy", "forces", "error"}
        assert model.properties["levels_of_theory"] == "PBE, B3LYP"
        (version,) = model.versions
        again = oip_stub.ModelMetadata(oip.ModelMetadataRequest(name="direct", version=version))
        assert again == model

    def test_readiness(self, oip_stub: GRPCInferenceServiceStub) -> None:
        assert oip_stub.ServerLive(oip.ServerLiveRequest()).live
        assert oip_stub.ServerReady(oip.ServerReadyRequest()).ready
        assert oip_stub.ModelReady(oip.ModelReadyRequest(name="tiny")).ready
        with pytest.raises(grpc.RpcError) as caught:
            oip_stub.ModelReady(oip.ModelReadyRequest(name="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def triton_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with Triton's client: its stubs and ours cannot live in one process."""
    home = tmp_path_factory.mktemp("triton")
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    installed = subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "tritonclient[grpc]==2.73.0",
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if installed.returncode and "No matching distribution" in installed.stderr + installed.stdout:
        pytest.skip("no package index can be reached from here: tritonclient cannot be installed")
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.mark.slow
def test_an_unmodified_tritonclient(
    triton_python: Path, server: Process, stub: PotentialServiceStub, tmp_path: Path
) -> None:
    example = Path(__file__).parents[2] / "examples" / "triton_client.py"
    systems = [molecule(1), crystal(2)]
    ours = read(stub.Predict(ask(systems, model="tiny")), systems)
    saved, answered = tmp_path / "structures.npz", tmp_path / "answer.npz"
    np.savez(saved, allow_pickle=False, **as_tensors(systems))
    ran = subprocess.run(
        [triton_python, example, server.address, "--model", "tiny", "--structures", saved, "--out", answered],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    answer = np.load(answered)
    np.testing.assert_array_equal(answer["energy"], ours.energy)
    np.testing.assert_array_equal(answer["forces"], ours.forces)
    ran = subprocess.run(
        [triton_python, example, server.address, "--model", "nobody", "--structures", saved],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    assert "no model 'nobody' is served here" in ran.stderr
