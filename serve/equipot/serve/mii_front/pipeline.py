"""What MII's server takes for one of its pipelines: it puts requests and gets responses, we compute.

MII's server answers each call in a thread of its own, which puts all its requests before it gets their
responses. All threads' structures wait in one queue of ours, so they share batches.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Generic, TypeVar, cast

from equipot.serve.config import ServeConfig
from equipot.serve.dispatcher import Dispatcher
from equipot.serve.engine import use_threads
from equipot.serve.errors import CallError
from equipot.serve.metrics import Metrics
from equipot.serve.mii_front.texts import request_of, text_of, text_of_error, within
from equipot.serve.opening import Opened, open_models
from equipot.serve.servicer import Gate, PotentialServicer
from equipot.serve.status import Context

ResponseT = TypeVar("ResponseT")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class _Caller:
    """As much of a gRPC context as a call through MII has: neither deadline nor peer come through."""

    def peer(self) -> str:
        return ""

    def time_remaining(self) -> None:
        return None

    def add_done_callback(self, callback: object) -> None:
        """The dispatcher hears of no caller's end, and so takes none for the only one."""


class Pipeline(Generic[ResponseT]):
    """Our engine in the shape of `MIIAsyncPipeline`.

    Args:
        config: what to serve and how.
        to_response: makes MII's response of a text.

    Raises:
        ServeError: it cannot serve as asked.
        BundleError: a bundle cannot be loaded.
    """

    def __init__(self, config: ServeConfig, to_response: Callable[[str], ResponseT]) -> None:
        self._config = config
        self._to_response = to_response
        self._uids = itertools.count()
        self._mine = threading.local()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="equipot-mii", daemon=True)
        self._thread.start()
        self._opened, self._dispatcher, self._servicer = self._within(self._open()).result()

    async def _open(self) -> tuple[Opened, Dispatcher, PotentialServicer]:
        config, metrics, gate = self._config, Metrics(), Gate()
        use_threads(config.threads)
        opened = await open_models(config, metrics)
        dispatcher = Dispatcher(config.budget, metrics, in_compute_thread=lambda: use_threads(config.threads))
        gate.open(opened.registry)
        return opened, dispatcher, PotentialServicer(gate, dispatcher, metrics, config.limits)

    def start(self) -> None:
        """MII's server calls it before it listens."""

    def shutdown(self) -> None:
        """MII's server calls it when it has stopped: what was accepted is answered."""
        try:
            self._within(asyncio.wait_for(self._dispatcher.quiet(), self._config.drain_seconds)).result()
        except TimeoutError:
            logger.warning("requests were still open after %g s and are ended", self._config.drain_seconds)
        self._opened.close()
        self._dispatcher.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def put_request(self, prompt: str, kwargs: Mapping[str, object]) -> int:
        """Queues one structure and returns the number that its response will have."""
        uid = next(self._uids)
        self._pending().append((uid, self._within(self._answer(prompt, kwargs))))
        return uid

    def get_response(self) -> tuple[int, ResponseT]:
        """The next response of those that this thread's requests wait for."""
        uid, future = self._pending().popleft()
        return uid, self._to_response(future.result())

    def flush_uid(self, uid: int) -> None:
        """Drops a request of this thread: its caller has the response, or has gone."""
        pending = self._pending()
        for entry in [entry for entry in pending if entry[0] == uid]:
            entry[1].cancel()
            pending.remove(entry)

    async def _answer(self, prompt: str, kwargs: Mapping[str, object]) -> str:
        try:
            within(prompt, self._config.limits.message_bytes)
            request = request_of(prompt, kwargs)
            return text_of(request, await self._servicer.Predict(request, cast("Context", _Caller())))
        except CallError as error:
            return text_of_error(error)
        except Exception:
            logger.exception("a request through MII failed")
            return text_of_error(CallError("the server failed on this request; its log has the reason"))

    def _pending(self) -> deque[tuple[int, Future[str]]]:
        if not hasattr(self._mine, "pending"):
            self._mine.pending = deque()
        return cast("deque[tuple[int, Future[str]]]", self._mine.pending)

    def _within(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
