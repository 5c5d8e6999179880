"""The Open Inference Protocol v2 as a front of our own service. Decides nothing that it does not decide.

Every request is put into the words of `PotentialService` and answered by it: limits, queue, failures and
statuses are the same, whichever way a caller comes.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import grpc
from google.protobuf.message import Message

from equipot.serve.card import NO_FORCES
from equipot.serve.errors import InvalidRequest, NotReady
from equipot.serve.servicer import PotentialServicer
from equipot.serve.status import Context, guarded
from equipot.wire.inference import open_inference_pb2 as oip
from equipot.wire.inference.codec import INPUTS, OUTPUTS, infer_response, predict_request, tensor_metadata
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.codec import CodecError

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

PLATFORM = "equipot"


class InferenceServicer:
    """The methods of `GRPCInferenceService`; they raise `CallError`, which `guarded` turns into statuses."""

    def __init__(self, potential: PotentialServicer, *, ready: Callable[[], bool]) -> None:
        """A front of `potential`; `ready` says whether it answers now."""
        self._potential = potential
        self._ready = ready

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:
        """Whether the process answers at all: it just did."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:
        """Whether ModelInfer is answered now."""
        return oip.ServerReadyResponse(ready=self._ready())

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:
        """Whether this model answers now; one that is not served here is an error.

        One that is not in memory is loaded from now on: who waits for it here would else wait for ever.
        """
        try:
            wanted = pb.PredictRequest(model=_address(request.name, request.version))
            self._potential.find(wanted, context).engine.check_ready()
        except NotReady:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(
        self, request: oip.ServerMetadataRequest, context: Context
    ) -> oip.ServerMetadataResponse:
        """The name and version of this program."""
        return oip.ServerMetadataResponse(name="equipot", version=importlib.metadata.version("equipot"))

    async def ModelMetadata(
        self, request: oip.ModelMetadataRequest, context: Context
    ) -> oip.ModelMetadataResponse:
        """The tensors a model takes and gives, and as properties what else a caller should know of it."""
        wanted = pb.GetModelRequest(model=_address(request.name, request.version))
        model = await self._potential.GetModel(wanted, context)
        everything = await self._potential.ListModels(pb.ListModelsRequest(), context)
        missing = {
            "forces": model.force_mode == NO_FORCES,
            "stress": not model.has_stress,
            "energy_spread": model.members < 2,
            "forces_spread": model.members < 2,
            "energy_interval": not model.is_calibrated,
            "forces_interval": not model.is_calibrated,
            "domain_score": not model.has_domain,
            "outside_domain": not model.has_domain,
        }
        outputs = {name: tensor for name, tensor in OUTPUTS.items() if not missing.get(name)}
        return oip.ModelMetadataResponse(
            name=model.name,
            # What stands after the @ of a name: without a repository, a digest alone.
            versions=[
                other.version or other.digest for other in everything.models if other.name == model.name
            ],
            platform=PLATFORM,
            inputs=tensor_metadata(INPUTS),
            outputs=tensor_metadata(outputs),
            properties={
                "levels_of_theory": ", ".join(model.levels_of_theory),
                "atomic_numbers": ", ".join(map(str, model.elements)),
                "cutoff_angstrom": f"{model.cutoff:g}",
                "force_mode": model.force_mode,
                "dtype": model.dtype,
                "units": "Å, eV, eV/Å, eV/Å³",
            },
        )

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:
        """Energies, forces and stress of a batch."""
        try:
            question = predict_request(request)
        except CodecError as error:
            raise InvalidRequest(str(error), field=error.field) from error
        answer = await self._potential.Predict(question, context)
        return infer_response(request, answer, question.structures.n_atoms)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, Message]] = {
            "ServerLive": guarded(self.ServerLive, oip.ServerLiveRequest),
            "ServerReady": guarded(self.ServerReady, oip.ServerReadyRequest),
            "ModelReady": guarded(self.ModelReady, oip.ModelReadyRequest),
            "ServerMetadata": guarded(self.ServerMetadata, oip.ServerMetadataRequest),
            "ModelMetadata": guarded(self.ModelMetadata, oip.ModelMetadataRequest),
            "ModelInfer": guarded(self.ModelInfer, oip.ModelInferRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _address(name: str, version: str) -> str:
    return f"{name}@{version}" if version else name
