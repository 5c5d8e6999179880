"""`equipot join`: lends this machine to a server whose model is spread over several."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from equipot.serve.errors import ServeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def join(
    leader: Annotated[str, typer.Argument(help="HOST:PORT of the server's --worker-port.")],
    key: Annotated[Path, typer.Option(help="File of random text: the server's --worker-key.")],
) -> None:
    """Take a share of the ranks of `equipot serve --worker-hosts` until SIGTERM; comes again when it does."""
    host, _, port = leader.rpartition(":")
    if not host or not port.isdecimal():
        raise ServeError(f"leader is {leader!r}: give HOST:PORT of the server's --worker-port")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    from equipot.serve.hosts import join as lend

    lend(host.strip("[]"), int(port), key, announce=typer.echo, stop=stop)
