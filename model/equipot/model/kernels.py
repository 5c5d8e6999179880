"""Decides which sweeps compute the messages, and builds the compiled ones once per machine.

The compiled sweeps are optional: on a CPU, where there is a C++ compiler, in float32 and float64, and in
bfloat16 where the processor multiplies it. Whatever keeps them from being built is remembered as the reason,
and the sweeps in pure torch do the work. Knows nothing of the function they compute.
"""

import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from equipot.model import compiled_sweeps, message_sweeps
from equipot.model.block_work import Gradients, Inputs, Wanted
from equipot.model.blocks import BlockedEdges
from equipot.model.message_sweeps import Direction

SOURCE = Path(__file__).with_name("message_kernels.cpp")
INFERENCE = SOURCE.with_name("inference_kernels.cpp")
HEADERS = tuple(sorted([*SOURCE.parent.glob("message_*.h"), *SOURCE.parent.glob("inference_*.h")]))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
LOCK_SECONDS = 900.0
"""How long to wait for another process that is building; far more than a build takes."""

_log = logging.getLogger(__name__)


class Sweeps(Protocol):
    """The four sweeps of `message_sweeps`, which documents them and their arguments."""

    def forward(self, x: Inputs, edges: BlockedEdges, *, keep: bool = ...) -> tuple[Tensor, Tensor | None]:
        """S, and what `reverse` may be given as ``y_kept``."""

    def reverse(
        self,
        x: Inputs,
        edges: BlockedEdges,
        g_out: Tensor,
        wanted: Wanted,
        *,
        y_kept: Tensor | None = ...,
        keep: bool = ...,
    ) -> tuple[Gradients, Tensor | None]:
        """First derivatives, and what `reverse_push` may be given as ``g_hidden_kept``."""

    def push(
        self,
        x: Inputs,
        edges: BlockedEdges,
        t: Direction,
        *,
        y_kept: Tensor | None = ...,
        keep: bool = ...,
    ) -> tuple[Tensor, Tensor | None]:
        """The derivative along t, and what `reverse_push` may be given as ``t_y_kept``."""

    def reverse_push(
        self,
        x: Inputs,
        edges: BlockedEdges,
        g_out: Tensor | None,
        g_push: Tensor,
        t: Direction,
        wanted: Wanted,
        *,
        y_kept: Tensor | None = ...,
        t_y_kept: Tensor | None = ...,
        g_hidden_kept: Tensor | None = ...,
    ) -> Gradients:
        """Second derivatives, together with first ones."""


class _State:
    """Whether the library is loaded, and if not, why not; None until somebody asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reason: str | None = None
        self.loaded: bool | None = None
        self.choice: Literal["auto", "torch"] = "auto"
        self.substitute: Sweeps | None = None


_state = _State()


def sweeps_for(x: Inputs) -> Sweeps:
    """The fastest sweeps that can take these inputs here."""
    if _state.substitute is not None and x.at_receiver.is_meta:
        return _state.substitute
    return compiled_sweeps if compiled_for(x.at_receiver) else message_sweeps


def compiled_for(features: Tensor) -> bool:
    """Whether compiled code takes inputs of these features' kind here."""
    if features.device.type != "cpu" or _state.choice != "auto" or not available():
        return False
    if features.dtype == torch.bfloat16:
        return bool(torch.ops.equipot.has_bfloat16())
    return features.dtype in (torch.float32, torch.float64)


@contextmanager
def pure_torch() -> Iterator[None]:
    """Within it, in every thread, sweeps that start are those in pure torch: for comparisons."""
    before, _state.choice = _state.choice, "torch"
    try:
        yield
    finally:
        _state.choice = before


@contextmanager
def on_meta(sweeps: Sweeps) -> Iterator[None]:
    """Within it, in every thread, these sweeps take tensors without numbers: to follow shapes and work."""
    before, _state.substitute = _state.substitute, sweeps
    try:
        yield
    finally:
        _state.substitute = before


def available() -> bool:
    """Whether the compiled sweeps are loaded; the first call loads them, and builds them if need be."""
    if _state.loaded is None:
        with _state.lock:
            if _state.loaded is None:
                try:
                    _load(cache_folder())
                # No compiler, a broken one, a read-only cache, a damaged library: none may stop work.
                except (OSError, RuntimeError, ImportError) as error:
                    _state.reason = next(iter(str(error).strip().splitlines()), repr(error))
                    # No warning: nobody needs them, and `kernel_status` tells whoever asks.
                    _log.info("messages: compiled kernels are off: %s", _state.reason)
                _state.loaded = _state.reason is None
    return _state.loaded


def library() -> Path | None:
    """The compiled library if it may be used here and now; see `available` and `pure_torch`."""
    return _library(cache_folder()) if _state.choice == "auto" and available() else None


def kernel_status() -> str:
    """One line for a person: whether compiled kernels are in use, and why not."""
    if available():
        return f"compiled ({_library(cache_folder())})"
    return f"pure torch: {_state.reason}"


def cache_folder() -> Path:
    """Where builds are kept: a folder per source, flags, torch and processor, as code fits one alone."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "equipot"
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (SOURCE, INFERENCE, *HEADERS)))
    for part in (*FLAGS, torch.__version__, platform.python_version(), _processor()):
        key.update(part.encode())
    return base / f"messages-{key.hexdigest()[:16]}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _library(folder: Path) -> Path:
    return folder / "equipot_messages.so"


def _load(folder: Path) -> None:
    library = _library(folder)
    if not library.exists():
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise RuntimeError("there is no C++ compiler; install g++ to speed up messages on the CPU")
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not library.exists():
                _build(folder, library)
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def _build(folder: Path, library: Path) -> None:
    # torch's builder waits without end for a lock that a killed process left. So each build has a folder of
    # its own, which nobody else can have locked, and the lock that processes wait for is the system's: it
    # dies with its holder. What a killed build leaves behind goes with the next one.
    from torch.utils import cpp_extension

    for left in folder.glob("build-*"):
        shutil.rmtree(left, ignore_errors=True)
    _log.warning("messages: building compiled kernels in %s, once on this machine (about a minute)", folder)
    build = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        cpp_extension.load(
            "equipot_messages",
            [str(SOURCE), str(INFERENCE)],
            extra_cflags=list(FLAGS),
            extra_ldflags=["-fopenmp"],
            build_directory=str(build),
            is_python_module=False,
        )
        (build / library.name).replace(library)
    finally:
        shutil.rmtree(build, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:
        raise RuntimeError("this system has no file locks that die with their holder") from error
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{path}: another process has been building for {LOCK_SECONDS:.0f} s; end it"
                    ) from None
                time.sleep(0.2)
        yield
