"""Watches the memory of other processes through the system's own books (Linux' /proc). Knows no torch."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 0.02
"""Between two looks."""


@dataclass(frozen=True, slots=True)
class Sample:
    """All processes at a moment."""

    time: float
    """as time.time() tells it"""
    own: int
    """bytes that are not files: the proportional share, summed"""
    files: int
    """bytes of mapped files, those that processes have in common once"""
    pss: int
    """proportional set sizes, summed: what other programs map, too, counts only in part"""


class Watch:
    """Looks at processes that announce themselves by files ``pid-N`` in a directory, until it is stopped."""

    def __init__(self, directory: Path, processes: int) -> None:
        self._directory = directory
        self._processes = processes
        self._stopping = threading.Event()
        self.samples: list[Sample] = []

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        files = max((sample.files for sample in self.samples), default=0)
        return files + max((sample.own for sample in self.samples), default=0)

    def stop(self) -> None:
        """End :meth:`run`."""
        self._stopping.set()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopping.wait(_SECONDS):
            pids = [path.name.removeprefix("pid-") for path in self._directory.glob("pid-*")]
            found = [sizes for pid in pids if (sizes := _sizes(Path("/proc") / pid))]
            if found:
                self.samples.append(
                    Sample(
                        time=time.time(),
                        own=sum(own for own, _, _ in found),
                        files=max(files for _, files, _ in found),
                        pss=sum(pss for _, _, pss in found),
                    )
                )


def _sizes(process: Path) -> tuple[int, int, int] | None:
    """Own bytes, bytes of files, proportional set size; None once it is gone."""
    try:
        sizes = _kilobytes((process / "smaps_rollup").read_text())
        files = _kilobytes((process / "status").read_text()).get("RssFile", 0)
    except (OSError, ValueError):
        return None
    if "Pss" not in sizes:
        return None
    return sizes["Pss_Anon"] + sizes["Pss_Shmem"], files, sizes["Pss"]


def _kilobytes(text: str) -> dict[str, int]:
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.split()[0]) * 1024
    return sizes
