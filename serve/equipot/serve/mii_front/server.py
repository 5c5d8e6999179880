"""MII's own server and load balancer in processes of this machine. The one room for mii.

The parts of MII that are used know nothing of text generation but the shape of a response; its configuration,
which wants a model and a tokenizer from Hugging Face, is stood in for.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import TYPE_CHECKING

import grpc

from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.free import check_port, free_port
from equipot.serve.logs import configure

if TYPE_CHECKING:
    from mii.backend import MIIClient

LOOK_SECONDS = 0.2
"""How often processes are looked at."""

EVERYWHERE = "0.0.0.0"
"""Where MII's servers listen, whatever --host says."""

TERMINATE = "/modelresponse.ModelResponse/Terminate"
"""The method of MII's server that ends it."""

logger = logging.getLogger(__name__)


def run(config: ServeConfig, *, replicas: int, announce: Callable[[str], None]) -> None:
    """Serves through MII until SIGTERM or SIGINT; a replica that dies is started again.

    Args:
        config: what to serve; its port is the load balancer's.
        replicas: how many engines, each in a process of its own.
        announce: called with each line for the operator.

    Raises:
        ServeError: it cannot start as asked.
    """
    check_plain(config)
    port = config.port or free_port()
    check_port(EVERYWHERE, port)
    for package in ("mii", "requests"):
        if importlib.util.find_spec(package) is None:
            raise ServeError(f"--mii needs {package}: pip install 'equipot[mii]'")
    ports = [free_port() for _ in range(replicas)]
    context = multiprocessing.get_context("spawn")
    # They outlive a Ctrl-C of the terminal: this process ends them when they have answered.
    engines = [context.Process(target=serve_replica, args=(config, each), daemon=True) for each in ports]
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    for engine in engines:
        engine.start()
    balancer = None
    try:
        for place, each in enumerate(ports):
            if not _answers(each, engines[place], stop):
                return
            announce(f"replica {place + 1} of {replicas} is ready")
        balancer = context.Process(target=serve_balancer, args=(ports, port), daemon=True)
        balancer.start()
        if _answers(port, balancer, stop):
            announce(f"serving {', '.join(path.name for path in config.bundles)} through MII on port {port}")
        while not stop.wait(LOOK_SECONDS):
            if not balancer.is_alive():
                raise ServeError("MII's load balancer has ended; the log above has the reason")
            for place, engine in enumerate(engines):
                if not engine.is_alive():
                    logger.error("replica %d ended (%s) and is started again", place + 1, engine.exitcode)
                    engines[place] = context.Process(
                        target=serve_replica, args=(config, ports[place]), daemon=True
                    )
                    engines[place].start()
        announce("draining")
        _terminate(port)
        for process in (balancer, *engines):
            process.join(config.drain_seconds + 15)
    finally:
        for process in (*engines, *([balancer] if balancer else [])):
            process.kill()
            process.join()


def client(port: int, host: str = "localhost") -> MIIClient:
    """MII's client of a server here; `client(port)([text, …], properties="energy,forces")`."""
    from mii.backend import MIIClient
    from mii.constants import TaskType

    with contextlib.suppress(RuntimeError):
        # MII asks for the thread's event loop and makes none.
        if asyncio.get_event_loop_policy().get_event_loop().is_closed():
            asyncio.set_event_loop(asyncio.new_event_loop())
    asked = SimpleNamespace(
        model_conf=SimpleNamespace(task=TaskType.TEXT_GENERATION), port_number=port, enable_restful_api=False
    )
    return MIIClient(asked, host=host)


def serve_replica(config: ServeConfig, port: int) -> None:
    """In a process of its own: one engine behind MII's server, until it is told to terminate."""
    _begin(config)
    from mii.batching.data_classes import Response
    from mii.constants import GenerationFinishReason
    from mii.grpc_related.modelresponse_server import serve_inference

    from equipot.serve.mii_front.pipeline import Pipeline

    def to_response(text: str) -> Response:
        return Response(
            generated_text=text,
            prompt_length=0,
            generated_length=0,
            finish_reason=GenerationFinishReason.STOP,
        )

    try:
        pipeline = Pipeline(config, to_response)
    except Exception as error:
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        sys.exit(f"error: {error}")
    with contextlib.redirect_stdout(sys.stderr):
        serve_inference(pipeline, port)


def serve_balancer(ports: Sequence[int], port: int) -> None:
    """In a process of its own: MII's load balancer, round robin over these replicas."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mii.constants import TaskType
    from mii.grpc_related.modelresponse_server import serve_load_balancing

    replicas = [SimpleNamespace(hostname="localhost", tensor_parallel_ports=[each]) for each in ports]
    with contextlib.redirect_stdout(sys.stderr):
        serve_load_balancing(SimpleNamespace(task=TaskType.TEXT_GENERATION, replica_configs=replicas), port)


def check_plain(config: ServeConfig) -> None:
    """Refuses what MII's server cannot do, rather than leave it out.

    Raises:
        ServeError: something of it is asked for.
    """
    for name in ("tls_cert", "tokens", "identity_limits", "jobs", "ui"):
        if getattr(config, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ServeError(f"MII's server knows nothing of {option}: leave it out, or serve without --mii")


def _terminate(port: int) -> None:
    """Tells the load balancer to end the replicas and itself, as MII's client would, but without MII."""
    with grpc.insecure_channel(f"localhost:{port}") as channel, contextlib.suppress(grpc.RpcError):
        call = channel.unary_unary(TERMINATE, request_serializer=None, response_deserializer=None)
        call(b"", timeout=10)


def _begin(config: ServeConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if config.device == "cpu":
        # DeepSpeed chooses its accelerator while MII imports it.
        os.environ["DS_ACCELERATOR"] = "cpu"
    configure(config.log_format, config.log_level)


def _answers(port: int, process: BaseProcess, stop: threading.Event) -> bool:
    """Waits until a process listens; False if this one is to stop.

    Raises:
        ServeError: it ended before.
    """
    while not stop.is_set():
        if not process.is_alive():
            raise ServeError("a process of MII's server ended while it started; the log above has the reason")
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return True
        time.sleep(LOOK_SECONDS)
    return False
