"""What memory there is and how much of it a stretch of work takes. Where the system does not tell: 0."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")


class MemoryMeter:
    """Peak memory of this process, or of the GPU it uses, between `start` and `stop`.

    Attributes:
        grown: bytes at the peak above those at the start.
    """

    def __init__(self, device: str) -> None:
        self._gpu = device.startswith("cuda")
        self._before = 0
        self.grown = 0

    def start(self) -> None:
        """From here on the peak counts."""
        self.grown = 0
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            RESET_PEAK.write_text("5")
        except OSError:
            self._before = 0
            return
        self._before = _kib(STATUS, "VmRSS")

    def stop(self) -> None:
        """Up to here."""
        if self._gpu:
            self.grown = torch.cuda.max_memory_allocated() - self._before
        elif self._before:
            self.grown = max(0, _kib(STATUS, "VmHWM") - self._before)

    def free_bytes(self) -> int:
        """Bytes that this process may still take; 0 if nobody tells."""
        if self._gpu:
            return int(torch.cuda.mem_get_info()[0])
        bounds = [_kib(MEMINFO, "MemAvailable"), _cgroup_free()]
        return min((bound for bound in bounds if bound), default=0)


def gpu_bytes(device: str) -> int:
    """Memory of the GPU that this process holds, what is kept for later included; 0 without one."""
    return torch.cuda.memory_reserved() if device.startswith("cuda") else 0


def memory_kills() -> int:
    """How many processes the system has ended so far for want of memory; 0 if nobody tells."""
    try:
        lines = VMSTAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _kib(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def _cgroup_free() -> int:
    try:
        most = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = (CGROUP / "memory.current").read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    return max(1, int(most) - int(used)) if most.isdigit() else 0
