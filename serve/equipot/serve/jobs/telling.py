"""What replies to a job's requests say of its structures, as it is kept. Knows neither store nor queue."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from equipot.serve.errors import InvalidRequest
from equipot.serve.jobs.kinds import Chunk, request_of
from equipot.serve.jobs.records import Move
from equipot.wire.v1 import jobs_pb2
from equipot.wire.v1 import potential_pb2 as pb


class Listener:
    """Hears replies to one chunk's request.

    Frames and observations are held back until the token behind them: they and the token are one move, so
    whatever goes on from that token brings neither of them again and leaves none out.
    """

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._held: dict[int, list[bytes]] = defaultdict(list)

    def move_of(self, reply: pb.RelaxReply | pb.SimulateReply) -> Move | None:
        """What is to be kept of a reply; None if that is nothing, or not yet anything."""
        match reply.WhichOneof("kind"):
            case "token":
                token = reply.token
                return Move(
                    place=self._chunk.places[token.index],
                    results=tuple(self._held.pop(token.index, ())),
                    walk=token.token,
                    steps=token.step,
                )
            case "result":
                return self._end(reply.result)
            case "frame" if isinstance(reply, pb.SimulateReply):
                index, reply.frame.index = reply.frame.index, self._chunk.places[reply.frame.index]
                self._held[index].append(self._bytes(index, frame=reply.frame))
            case "observation" if isinstance(reply, pb.SimulateReply):
                seen = reply.observation
                index, seen.index = seen.index, self._chunk.places[seen.index]
                kept = jobs_pb2.JobResult(index=seen.index, observation=seen)
                self._held[index].append(kept.SerializeToString())
        return None

    def _end(self, result: pb.RelaxResult | pb.SimulateResult) -> Move:
        index, result.index = result.index, self._chunk.places[result.index]
        if failed := result.HasField("failure"):
            result.failure.index = result.index
        if isinstance(result, pb.RelaxResult):
            data = self._bytes(index, relaxed=result)
        else:
            request = self._chunk.request
            assert isinstance(request, pb.SimulateRequest)
            data = self._bytes(index, simulated=result, seed=request.seeds[index])
        return Move(
            place=result.index,
            results=(*self._held.pop(index, ()), data),
            ended=True,
            failed=failed,
            steps=result.steps,
        )

    def _bytes(
        self,
        index: int,
        *,
        relaxed: pb.RelaxResult | None = None,
        frame: pb.MotionFrame | None = None,
        simulated: pb.SimulateResult | None = None,
        seed: int = 0,
    ) -> bytes:
        structures = self._chunk.structures
        offsets = structures.offsets
        numbers = structures.atomic_numbers[offsets[index] : offsets[index + 1]]
        return jobs_pb2.JobResult(
            index=self._chunk.places[index],
            atomic_numbers=numbers.astype("<i4").tobytes(),
            pbc=structures.pbc[index].astype(np.uint8).tobytes(),
            relaxed=relaxed,
            frame=frame,
            simulated=simulated,
            seed=seed,
        ).SerializeToString()


def refusals_of(request: jobs_pb2.SubmitJobRequest) -> tuple[Move, ...]:
    """Ends of structures that their sender refused.

    Raises:
        InvalidRequest: one is not there, or has atoms.
    """
    asked = request_of(request)
    counts = asked.structures.n_atoms
    moves = []
    for failure in request.refused:
        if failure.index >= len(counts) or counts[failure.index]:
            raise InvalidRequest(
                f"structure {failure.index} is refused, and is none of this part's {len(counts)} that has no"
                " atoms",
                field="refused",
            )
        failure.index = place = request.start + failure.index
        if isinstance(asked, pb.RelaxRequest):
            ended = pb.RelaxResult(index=place, energy=np.nan, failure=failure)
            result = jobs_pb2.JobResult(index=place, relaxed=ended)
        else:
            result = jobs_pb2.JobResult(
                index=place, simulated=pb.SimulateResult(index=place, failure=failure)
            )
        moves.append(Move(place=place, results=(result.SerializeToString(),), ended=True, failed=True))
    return tuple(moves)
