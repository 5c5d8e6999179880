"""What it costs a call to pass the server's door: empty calls in one process, each kind in turn, as JSON.

The reference is gRPC's own asyncio server with the same empty method and no interceptor. Client and server
share one event loop, so a figure is the work of both sides. What the log line takes comes after the answer,
and before the next call here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from equipot.serve.door import Door
from equipot.serve.logs import JsonFormatter
from equipot.serve.metrics import Metrics
from equipot.serve.patience import Patience
from equipot.serve.quotas import Allowance, Allowances, Quotas
from equipot.serve.reread import Reread
from equipot.serve.tokens import Tokens

TOKEN = "a-token-of-no-use-elsewhere"
METHOD = "/equipot.benchmark.Empty/Call"
REFERENCE = "no door"


@dataclass(frozen=True)
class Kind:
    """One way to serve the empty method, and how it is called."""

    name: str
    server: grpc.aio.Server
    call: Any
    metadata: tuple[tuple[str, str], ...]


async def make(name: str, door: Door | None, metadata: tuple[tuple[str, str], ...] = ()) -> Kind:
    """A server of its own on a port of its own."""

    async def empty(request: bytes, context: object) -> bytes:
        return b""

    server = grpc.aio.server(interceptors=[] if door is None else [door])
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(empty)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("equipot.benchmark.Empty", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    return Kind(name, server, channel.unary_unary(METHOD, None, None), metadata)


def door(*, tokens: Path | None = None, limits: bool = False, traced: bool = False) -> Door:
    """A door with these locks."""
    allowance = (
        Allowance(requests_per_second=1e9, atoms_per_second=1e9, edges_per_second=1e9)
        if limits
        else Allowance()
    )
    return Door(
        tokens=None if tokens is None else Reread("tokens", [tokens], lambda: Tokens.read(tokens)),
        quotas=Quotas(Allowances(default=allowance)),
        open_to_all=(),
        certificates_name=False,
        on_refusal=lambda outcome: None,
        on_stream=lambda call: None,
        on_done=(lambda call: None) if traced else None,
        under_way=Metrics().calls,
        patience=Patience(1_200.0),
    )


async def measure(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Microseconds a call by kind: the median, and what is beyond the reference's, by round."""
    tokens = folder / "tokens"
    tokens.write_text("".join(f"user-{number}: {TOKEN}-{number}\n" for number in range(1000)))
    shown = (("authorization", f"Bearer {TOKEN}-500"),)
    kinds = [
        await make(REFERENCE, None),
        await make("door", door()),
        await make("tokens", door(tokens=tokens), shown),
        await make("tokens and limits", door(tokens=tokens, limits=True), shown),
        await make("tokens, limits and log", door(tokens=tokens, limits=True, traced=True), shown),
    ]
    access = logging.getLogger("equipot.access")
    seconds: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            access.disabled = "log" not in kind.name
            begun = time.perf_counter()
            await kind.call(b"", metadata=kind.metadata)
            # The loop's next turn, in which the line is written.
            await asyncio.sleep(0)
            seconds[kind.name].append(time.perf_counter() - begun)
    for kind in kinds:
        await kind.server.stop(0)
    reference = seconds[REFERENCE]
    return {
        name: {
            "median_us": round(1e6 * statistics.median(taken), 1),
            "more_us": round(
                1e6 * statistics.median(a - b for a, b in zip(taken, reference, strict=True)), 1
            ),
        }
        for name, taken in seconds.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3_000)
    rounds = parser.parse_args(arguments).rounds
    with Path(os.devnull).open("w") as nowhere, tempfile.TemporaryDirectory() as folder:
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        print(json.dumps({"rounds": rounds, "kinds": asyncio.run(measure(rounds, Path(folder)))}, indent=1))


if __name__ == "__main__":
    main()
