"""What the server says over HTTP: `/metrics`, and the page if it is offered; in its event loop."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable

from aiohttp import web

from equipot.serve.errors import ServeError
from equipot.serve.metrics import Metrics

LAST_ANSWERS_SECONDS = 2.0
"""Time for answers that are ready to leave, once the server stops."""


class HttpSide:
    """An HTTP server.

    Args:
        metrics: what is told at `/metrics`.
        host: where it listens.
        port: there; 0 takes a free one.
        tls: with which it speaks HTTPS; None speaks HTTP.

    Attributes:
        port: the one it listens on, once it was started.
    """

    def __init__(self, metrics: Metrics, *, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._host, self.port, self._tls = host, port, tls
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self, *, more: Callable[[web.Application], None] | None = None) -> None:
        """Listens.

        Args:
            more: adds what is answered besides `/metrics`.

        Raises:
            ServeError: the port is in use or may not be used.
        """
        application = web.Application()
        application.router.add_get("/metrics", self._answer)
        if more is not None:
            more(application)
        # Handlers end when their caller leaves: what a page asked for is not computed for nobody.
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=LAST_ANSWERS_SECONDS,
        )
        await runner.setup()
        site = web.TCPSite(runner, self._host, self.port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise ServeError(
                    f"metrics port {self.port} is in use: choose another --metrics-port (0 takes a free one)"
                    " or --no-metrics"
                ) from error
            raise ServeError(
                f"cannot serve metrics on {self._host} port {self.port}: {error.strerror or error}"
            ) from error
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Ends every connection."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})
