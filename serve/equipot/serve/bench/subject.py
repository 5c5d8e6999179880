"""The server that is measured: started here in a process of its own, or running elsewhere."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from equipot.serve.errors import ServeError

END_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Subject:
    """Where the server listens, and its process id; 0 if it runs elsewhere."""

    address: str
    pid: int = 0

    @property
    def alive(self) -> bool:
        """Whether its process runs; True for one elsewhere."""
        if not self.pid:
            return True
        try:
            # One that has ended stays as a zombie until it is waited for.
            return "\nState:\tZ" not in Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return False

    def resident_bytes(self) -> int:
        """Its memory; 0 where nobody tells."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


@contextlib.contextmanager
def served(bundle: Path, words: Sequence[str]) -> Iterator[Subject]:
    """`equipot serve` of a bundle on a free port, ended afterwards.

    Args:
        bundle: to serve.
        words: more of the command line.

    Raises:
        ServeError: it did not start; the message ends with its log.
    """
    command = [
        sys.executable,
        "-m",
        "equipot.cli",
        "serve",
        str(bundle),
        "--port",
        "0",
        "--metrics-port",
        "0",
    ]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("serving "):
                    yield Subject(line.rsplit(" on ", 1)[1].strip(), server.pid)
                    return
            log.seek(0)
            raise ServeError(f"the server did not start: {log.read()[-2000:]}")
        finally:
            server.terminate()
            try:
                server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
