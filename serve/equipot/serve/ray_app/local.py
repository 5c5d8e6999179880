"""`equipot serve --ray`: a Ray Serve application from the first process to the last answer.

Starts a Ray of its own, with all that it writes in a folder of its own, unless RAY_ADDRESS names one to join.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from equipot.model.bundle import read_card
from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.free import free_port
from equipot.serve.ray_app.settings import STOP_MARGIN, RaySettings, split
from equipot.wire.v1 import potential_pb2 as pb
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

if TYPE_CHECKING:
    from ray.serve import Application

LOOK_SECONDS = 0.5
"""How often the application's state is asked for while it starts."""

DEREGISTER_SECONDS = "5"
"""How long a replica that leaves still answers, so that proxies of this machine hear of it."""

OWNERS = "equipot-owners"
"""Where Ray keeps, by name, which command an application belongs to."""

logger = logging.getLogger(__name__)


def run(mapping: Mapping[str, object], *, base: Path, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then lets replicas answer what they accepted; a second signal ends it.

    Args:
        mapping: a configuration, as a file holds it.
        base: the folder that its relative paths start from.
        announce: called with each line for the operator: the way there, and when calls are answered.

    Raises:
        ServeError: it cannot be done as asked.
        BundleError: a bundle of this machine cannot be loaded.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("fastapi") is None:
        raise ServeError("--ray needs Ray Serve: pip install 'equipot[serve]'")
    config, settings = split(mapping, base=base)
    if ":" in config.host:
        raise ServeError(
            f"host is {config.host}, and Ray's proxy answers on IPv4 alone: give an address of that,"
            " or serve without --ray"
        )
    if not os.environ.get("RAY_ADDRESS"):
        check_free(config.host, config.port)
        # Else replicas would be tried many times, each time in vain.
        for bundle in config.bundles:
            read_card(bundle)
    stop = threading.Event()
    with ray_cluster(config, settings, announce) as folder:
        on_signals(stop, folder)
        from ray import serve

        from equipot.serve.ray_app.application import application

        port = running_port(config.port)
        starts = port is None
        me = uuid.uuid4().bytes
        claim(settings.name, me)
        try:
            if port is None:
                port = config.port or free_port()
                check_free(config.host, port)
                start_serve(config.host, port)
            if _status(settings.name) is not None:
                announce(f"replacing the application {settings.name} that runs there")
            if _deploy(application(mapping, base=base), settings, stop, announce):
                announce(f"serving {_names(config.host, port, settings.name, stop)} on {config.host}:{port}")
                stop.wait()
        finally:
            mine = {settings.name} if owns(settings.name, me) else set()
            if mine:
                announce("draining")
                with contextlib.suppress(Exception):
                    _delete(settings.name, config.drain_seconds + STOP_MARGIN)
            else:
                announce(f"another command has replaced the application {settings.name}, which goes on")
            # Who has come since then is served by it, too.
            if starts and not set(serve.status().applications) - mine:
                serve.shutdown()
    announce("stopped")


@contextlib.contextmanager
def ray_cluster(
    config: ServeConfig, settings: RaySettings, announce: Callable[[str], None]
) -> Iterator[Path | None]:
    """A Ray for the length of the block: that of RAY_ADDRESS, or one of this machine alone, with its folder.

    Raises:
        ServeError: there is no Ray at RAY_ADDRESS, or it does not let us in.
    """
    if where := os.environ.get("RAY_ADDRESS"):
        import ray

        announce(f"joining Ray at {where}")
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ServeError(f"cannot join the Ray of RAY_ADDRESS={where}: {error}") from error
        try:
            yield None
        finally:
            ray.shutdown()
        return
    # A short path: sockets' names are limited to some hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="equipot-", dir="/tmp"))
    for name, value in environment(folder, config).items():
        os.environ.setdefault(name, value)
    # Only now: Ray Serve reads its environment while it is imported.
    import ray

    cores = os.cpu_count() or 1
    wanted = (settings.max_replicas or settings.replicas) * config.tensor_parallel
    each = float(config.threads or 1) if settings.cpus is None else settings.cpus
    announce(f"starting Ray in {folder}")
    try:
        ray.init(
            address="local",
            # One machine was asked for so many: they share its cores if there are not enough.
            num_cpus=max(cores, round(wanted * each)),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def start_serve(host: str, port: int) -> None:
    """Starts Ray Serve and its proxy, with our services on this port.

    Raises:
        ServeError: it does not start.
    """
    from ray import serve
    from ray.exceptions import RayError

    from equipot.serve.ray_app.application import MOUNT

    try:
        serve.start(
            http_options={"host": host, "port": free_port()},
            grpc_options={"port": port, "grpc_servicer_functions": [MOUNT]},
        )
    except RayError as error:
        raise ServeError(f"Ray Serve does not start: {error}") from error


def running_port(wanted: int) -> int | None:
    """The port of the Ray Serve that runs already, which serves all applications; None if none runs.

    Raises:
        ServeError: another one is wanted (0 wants none), or our services are not on it.
    """
    from ray import get
    from ray.serve.context import _get_global_client

    from equipot.serve.ray_app.application import MOUNT

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = get(client._controller.get_grpc_config.remote())
    if MOUNT not in options.grpc_servicer_functions:
        raise ServeError(
            f"the Ray Serve that runs there was started without {MOUNT} among its"
            " grpc_options.grpc_servicer_functions: start it with that, as serve/recipes/ray.yaml does"
        )
    port = int(options.port)
    if wanted not in (0, port):
        raise ServeError(
            f"Ray Serve runs there already, and its port is {port}, not {wanted}: choose --port {port}"
        )
    return port


def environment(folder: Path, config: ServeConfig) -> dict[str, str]:
    """What a Ray of our own is told: HAProxy before the replicas, and no file or port shared with another."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "h" / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "h" / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "h" / "m.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DEREGISTER_SECONDS,
        # HAProxy is replaced when replicas leave; the old one ends, with its calls, after so many seconds.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(max(120, math.ceil(config.drain_seconds + STOP_MARGIN))),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": "1000",
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": "1000",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(config.limits.message_bytes),
        # By default Ray gives up a proxy that takes five seconds to come up, as on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _deploy(
    target: Application, settings: RaySettings, stop: threading.Event, announce: Callable[[str], None]
) -> bool:
    """Runs the application and tells how far it is; False if it was told to stop meanwhile.

    Raises:
        ServeError: no replica could start.
    """
    from ray import serve

    failure: list[BaseException] = []

    def deploy() -> None:
        try:
            # A route is what Ray wants of each for HTTP, of which nobody makes use.
            serve.run(target, name=settings.name, route_prefix="/" + settings.name)
        except BaseException as error:  # told to the operator below
            failure.append(error)

    thread = threading.Thread(target=deploy, name="equipot-deploy", daemon=True)
    thread.start()
    before = ""
    while thread.is_alive() and not stop.is_set():
        thread.join(LOOK_SECONDS)
        now = _progress(settings.name)
        if now and now != before:
            announce(now)
            before = now
    if stop.is_set():
        return False
    if failure:
        why = _reason(settings.name) or str(failure[0])
        raise ServeError(f"no replica could start: {why}") from failure[0]
    return True


def claim(name: str, owner: bytes) -> None:
    """Notes in Ray that the application of this name is the owner's from now on, whoever had it before."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(name, owner, overwrite=True, namespace=OWNERS)


def owns(name: str, owner: bytes) -> bool:
    """Whether nobody else has claimed the application since: else it is not the owner's to end."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(name, namespace=OWNERS) in (owner, None)


def _delete(name: str, seconds: float) -> None:
    """Ends the application; returns once its replicas have left. Ray itself would wait for one minute."""
    from ray import serve

    serve.delete(name, _blocking=False)
    end = time.monotonic() + seconds
    while _status(name) is not None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)


def _progress(name: str) -> str:
    application = _status(name)
    if application is None:
        return ""
    states = [
        f"{count} {state.lower()}"
        for deployment in application.deployments.values()
        for state, count in deployment.replica_states.items()
        if count
    ]
    return f"replicas: {', '.join(states)}" if states else ""


def _reason(name: str) -> str:
    """What Ray says of a deployment that failed: the last line of the replica's own error."""
    application = _status(name)
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error" in line]
    return lines[-1].partition("Error: ")[2] or lines[-1] if lines else ""


def _status(name: str) -> Any:  # noqa: ANN401  # Ray has no types here
    from ray import serve

    return serve.status().applications.get(name)


def _names(host: str, port: int, application: str, stop: threading.Event) -> str:
    """The models, asked for at the port that callers use: it answers, then. None are told without a token."""
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        while not stop.is_set():
            try:
                service, ours = PotentialServiceStub(channel), (("application", application),)
                answer = service.ListModels(pb.ListModelsRequest(), metadata=ours, timeout=5)
                return ", ".join(model.name for model in answer.models)
            except grpc.RpcError as error:
                if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    return "callers with a token"
            time.sleep(LOOK_SECONDS)
    return ""


def on_signals(stop: threading.Event, folder: Path | None = None) -> None:
    """The first SIGTERM or SIGINT sets the event, the second one ends the process and removes the folder."""

    def received(number: int, frame: object) -> None:
        if stop.is_set():
            if folder is not None:
                _end_proxies(folder)
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, received)


def _end_proxies(folder: Path) -> None:
    """Ends the HAProxy of this folder, which would outlive Ray and keep the port."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *words = (entry / "cmdline").read_bytes().split(b"\0")
            if program.endswith(b"haproxy") and any(word.startswith(bytes(folder) + b"/") for word in words):
                os.kill(int(entry.name), signal.SIGKILL)


def check_free(host: str, port: int) -> None:
    """Raises ServeError if the port is in use or may not be used."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose --port"
        ) from error
