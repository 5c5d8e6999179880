"""The page's routes: its files, and JSON that stands for calls of the service. Computes nothing itself."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from aiohttp import web

from equipot.serve.config import RequestLimits
from equipot.serve.door import Door
from equipot.serve.errors import (
    CallError,
    DeadlinePassed,
    DeadlineUnreachable,
    Forbidden,
    InvalidRequest,
    NotReady,
    NotServed,
    OverLimit,
    OverQuota,
    QueueFull,
    Unauthenticated,
)
from equipot.serve.intake import Room
from equipot.serve.metrics import Metrics
from equipot.serve.motion.servicer import MotionServicer
from equipot.serve.servicer import PotentialServicer
from equipot.serve.status import Context
from equipot.serve.ui import messages, motion
from equipot.serve.ui.caller import caller
from equipot.serve.ui.reading import MOST_BYTES, MOST_FRAMES, read_structures
from equipot.serve.ui.security import HEADERS, objection
from equipot.serve.ui.values import Json
from equipot.wire.v1 import potential_pb2 as pb

STATIC = Path(__file__).with_name("static")
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

LARGEST_QUESTION = 16 * 2**20
"""Bytes of a question in JSON: what a file of the largest size comes to."""

READERS = 2
"""Threads that read files and JSON: a second one, so that one long file does not hold up everybody's."""

ARRIVES_SECONDS = 60.0
"""For all of a question: it has room in memory meanwhile that others could use."""

STATUSES: Mapping[type[CallError], int] = MappingProxyType(
    {
        InvalidRequest: 400,
        Unauthenticated: 401,
        Forbidden: 403,
        NotServed: 404,
        OverLimit: 413,
        OverQuota: 429,
        QueueFull: 429,
        DeadlineUnreachable: 429,
        NotReady: 503,
        DeadlinePassed: 504,
    }
)

T = TypeVar("T")
Asked = TypeVar("Asked")
Told = TypeVar("Told")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the page stands before.

    Attributes:
        door: that its calls pass as all others do.
        potential: computes.
        motion: moves.
        metrics: of the server.
        limits: of requests.
        only_here: whether only this machine reaches the page.
        patience: seconds without a line read, after which a browser is cut off.
    """

    door: Door
    potential: PotentialServicer
    motion: MotionServicer
    metrics: Metrics
    limits: RequestLimits
    only_here: bool
    patience: float


class Page:
    """Everything under `/ui`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._reading = ThreadPoolExecutor(READERS, "equipot-reading")
        self._room = Room(LARGEST_QUESTION)
        self._version = importlib.metadata.version("equipot")

    def add_to(self, application: web.Application) -> None:
        """Registers the routes."""
        router = application.router
        router.add_get("/ui", _to_the_page)
        for path in sorted(STATIC.iterdir()):
            if path.suffix in KINDS:
                name = "" if path.name == "index.html" else path.name
                router.add_get(f"/ui/{name}", _file(path.read_bytes(), KINDS[path.suffix]))
        router.add_get("/ui/api/elements", self._guarded(self._elements))
        router.add_get("/ui/api/models", self._guarded(self._models))
        router.add_get("/ui/api/pulse", self._guarded(self._pulse))
        router.add_post("/ui/api/read", self._guarded(self._read))
        router.add_post("/ui/api/predict", self._guarded(self._predict))
        router.add_post("/ui/api/relax", self._guarded(self._relax))
        router.add_post("/ui/api/simulate", self._guarded(self._simulate))
        application.on_cleanup.append(self._close)

    async def _close(self, application: web.Application) -> None:
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def _elements(self, request: web.Request) -> web.StreamResponse:
        return _json(messages.elements_json())

    async def _models(self, request: web.Request) -> web.StreamResponse:
        async with self._call(request, "Page/Models") as context:
            listed = await self._services.potential.ListModels(pb.ListModelsRequest(), context)
        limits = self._services.limits
        return _json(
            {
                "server": self._version,
                "models": [messages.model_json(model) for model in listed.models],
                "limits": {
                    "atoms": limits.structure_atoms,
                    "bytes": MOST_BYTES,
                    "frames": MOST_FRAMES,
                    "steps": motion.MOST_MOVING,
                },
            }
        )

    async def _pulse(self, request: web.Request) -> web.StreamResponse:
        # Behind the door for its token alone: whoever looks on uses up nothing that others may ask for.
        self._services.door.recognise("/equipot.Page/Pulse", _metadata(request))
        metrics = self._services.metrics
        return _json(
            {
                "queue": asdict(metrics.depth()),
                "now": metrics.now(),
                "whole": asdict(metrics.recent.whole()),
                "spans": [asdict(span) for span in metrics.recent.spans()],
            }
        )

    async def _read(self, request: web.Request) -> web.StreamResponse:
        async with self._call(request, "Page/Read"):
            data = await _body(request, MOST_BYTES)
            most = self._services.limits.structure_atoms
            upload = await self._aside(
                lambda: read_structures(request.query.get("name", ""), data, most_atoms=most)
            )
            frames = [messages.frame_json(atoms) for atoms in upload.frames]
        return await self._aside(lambda: _json({"format": upload.format, "frames": frames}))

    async def _predict(self, request: web.Request) -> web.StreamResponse:
        async with self._call(request, "Page/Predict") as context:
            data = await _body(request, LARGEST_QUESTION)
            asked = await self._aside(lambda: messages.predict_request(_question(data)))
            answer = await self._services.potential.Predict(asked, context)
            counts = list(asked.structures.n_atoms)
        return await self._aside(lambda: _json(messages.predictions_json(answer, counts)))

    async def _relax(self, request: web.Request) -> web.StreamResponse:
        relax = self._services.motion.relax
        return await self._played(request, "Page/Relax", motion.relax_request, relax, motion.relax_json)

    async def _simulate(self, request: web.Request) -> web.StreamResponse:
        move = self._services.motion.simulate
        return await self._played(
            request, "Page/Simulate", motion.simulate_request, move, motion.simulate_json
        )

    async def _played(
        self,
        request: web.Request,
        method: str,
        understand: Callable[[Mapping[str, Any]], Asked],
        carry_out: Callable[[Asked, Context], AsyncGenerator[Told, None]],
        line_of: Callable[[Told], Json | None],
    ) -> web.StreamResponse:
        """The replies of a call as lines of JSON, as they come."""
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/x-ndjson"})
        try:
            async with self._call(request, method, of_many=True) as context:
                data = await _body(request, LARGEST_QUESTION)
                asked = await self._aside(lambda: understand(_question(data)))
                async with aclosing(carry_out(asked, context)) as replies:
                    async for reply in replies:
                        line = await self._aside(functools.partial(_line, line_of, reply))
                        if not line:
                            continue
                        if not response.prepared:
                            await response.prepare(request)
                        await self._sent(request, response.write(line))
        except Exception as error:
            # Once an answer has begun, nothing but a line of it can say how it ended.
            if not response.prepared or isinstance(error, ConnectionError):
                raise
            failure = error if isinstance(error, CallError) else _unexpected(request)
            line = _dump({"kind": "error", "error": _error_json(failure)}) + b"\n"
            await self._sent(request, response.write(line))
        await self._sent(request, response.write_eof())
        return response

    async def _sent(self, request: web.Request, writing: Awaitable[None]) -> None:
        """Waits while the browser does not read, but not for ever; the outbox behind it is bounded.

        Raises:
            ConnectionError: the browser has left, or has not read for too long and is now cut off.
        """
        try:
            async with asyncio.timeout(self._services.patience):
                await writing
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("nothing was read for too long") from None

    async def _aside(self, work: Callable[[], T]) -> T:
        """What it comes to, in a thread: in the loop it would hold up everybody's batches."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    @contextmanager
    def _held(self, n_bytes: int) -> Iterator[None]:
        """Room in memory for what is sent, until it is answered."""
        if not self._room.has(n_bytes):
            raise self._room.full()
        self._room.held += n_bytes
        try:
            yield
        finally:
            self._room.held -= n_bytes

    @asynccontextmanager
    async def _call(
        self, request: web.Request, method: str, *, of_many: bool = False
    ) -> AsyncIterator[Context]:
        """A call of the service behind the door."""
        peer = f"http:{request.remote}"
        door = self._services.door
        async with door.passing(f"/equipot.{method}", _metadata(request), peer=peer, of_many=of_many):
            with caller(peer) as context:
                yield context

    def _guarded(self, handler: Handler) -> Handler:
        """The handler, for the page alone, with its errors as JSON."""

        async def answer(request: web.Request) -> web.StreamResponse:
            refusal = objection(request.headers, only_here=self._services.only_here)
            if refusal is not None:
                return _json({"error": {"reason": "FORBIDDEN", "message": refusal}}, status=403)
            try:
                with self._held(min(_announced(request), LARGEST_QUESTION)):
                    return await handler(request)
            except CallError as error:
                return _refused(error)
            except ConnectionError:
                # The browser has left in the middle of an answer; nobody is told anything.
                raise asyncio.CancelledError from None
            except web.HTTPException:
                raise
            except Exception:
                return _refused(_unexpected(request))

        return answer


def _unexpected(request: web.Request) -> CallError:
    """What a browser is told of an exception that nobody expected, which is now in the log."""
    logger.exception("the page's %s failed", request.path)
    return CallError("the server failed on this request; its log has the reason")


async def _to_the_page(request: web.Request) -> web.StreamResponse:
    raise web.HTTPPermanentRedirect("/ui/")


def _file(content: bytes, kind: str) -> Handler:
    """A file of the page, which browsers keep as long as it does not change."""
    tag = hashlib.sha256(content).hexdigest()[:32]
    headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-cache"}

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.Response(headers=headers)
        response.etag = tag
        if any(one.value == tag for one in request.if_none_match or ()):
            response.set_status(304)
            return response
        response.body = content
        response.enable_compression()
        return response

    return answer


async def _body(request: web.Request, most: int) -> bytes:
    """What was sent, which is kept in memory alone.

    Raises:
        OverLimit: it is too large; none of it is read.
        InvalidRequest: it does not come, or does not come as it is.
    """
    size = _announced(request)
    if size > most:
        raise OverLimit(f"what was sent has {size} bytes, and the page takes {most}")
    if not size:
        return b""
    if "Content-Encoding" in request.headers:
        raise InvalidRequest("what was sent is packed: send it as it is (without Content-Encoding)")
    try:
        async with asyncio.timeout(ARRIVES_SECONDS):
            return await request.content.readexactly(size)
    except (TimeoutError, asyncio.IncompleteReadError):
        raise InvalidRequest(f"the {size} bytes that were announced did not come") from None


def _announced(request: web.Request) -> int:
    """Bytes that a request says it brings.

    Raises:
        InvalidRequest: it brings some and does not say how many.
    """
    if request.content_length is None and request.can_read_body:
        raise InvalidRequest("say how much is sent (Content-Length)")
    return request.content_length or 0


def _question(data: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the question is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest("the question is no JSON object")
    return body


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in request.headers.items()]


def _dump(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _line(line_of: Callable[[Told], Json | None], reply: Told) -> bytes:
    """A reply as a line of JSON; nothing for one that the page does not need."""
    told = line_of(reply)
    return b"" if told is None else _dump(told) + b"\n"


def _json(value: object, *, status: int = 200) -> web.Response:
    headers = {**HEADERS, "Content-Type": "application/json", "Cache-Control": "no-store"}
    return web.Response(body=_dump(value), status=status, headers=headers)


def _error_json(error: CallError) -> Json:
    return {
        "reason": error.reason,
        "message": error.message,
        "field": error.field,
        "retry_after": error.retry_after,
    }


def _refused(error: CallError) -> web.Response:
    return _json({"error": _error_json(error)}, status=STATUSES.get(type(error), 500))
