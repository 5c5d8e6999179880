"""Keeping things in files while a rank runs: whether this machine can, and where. Knows not what they are."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from equipot.train.errors import TrainError

_PREFIX = "equipot-scratch"


# DeepSpeed reads and writes by libaio, from an extension that it builds at first use.
_USES_LIBAIO = (
    "#include <libaio.h>\nint main() { io_context_t context = nullptr; return io_destroy(context); }"
)


def nvme_problem() -> tuple[str, str] | None:
    """Why nothing can be offloaded to NVMe on this machine, and the remedy; None if it can."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return "impossible: no C++ compiler to build DeepSpeed's extensions", "apt-get install g++"
    build = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    if subprocess.run(build, input=_USES_LIBAIO.encode(), capture_output=True).returncode:
        return "impossible: libaio and its headers are not installed", "apt-get install libaio-dev"
    return None


def scratch_directory(parent: Path) -> Path:
    """A new directory of this process alone, removed when it ends; runs may share the parent.

    What processes of this machine left behind when they were killed is removed.

    Raises:
        TrainError: nothing can be written there.
    """
    mine = f"{_PREFIX}-{socket.gethostname()}-"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{mine}*-*"):
            if not _is_running(left.name.removeprefix(mine).split("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=parent))
    except OSError as error:
        raise TrainError(
            f"zero.nvme_path = {parent} cannot be written ({error}); name a directory on a fast disk of this "
            "machine"
        ) from None
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True
