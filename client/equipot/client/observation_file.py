"""What was observed of a trajectory, step by step, as a CSV file, and what that comes to. Knows no server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipot.client.dynamics import Observation
from equipot.client.errors import FileError
from equipot.client.open_files import OpenFiles

COLUMNS = (
    *("step", "time_fs", "energy_eV", "kinetic_energy_eV", "total_energy_eV", "temperature_K"),
    *("volume_A3", "pressure_eV_per_A3", "largest_force_eV_per_A"),
)
_HEAD = (",".join(COLUMNS) + "\n").encode()


class ObservationFile:
    """The observations of one trajectory: a line for each; what is not known is left empty.

    Args:
        path: the file.
        files: by which it is opened.
        timestep: fs; None if it is not known.
        resume: whether to go on with it; else what is there is written over.

    Raises:
        FileError: it is no such file, or cannot be read or written.
    """

    def __init__(self, path: Path, files: OpenFiles, *, timestep: float | None, resume: bool) -> None:
        self.path = path
        self.reached = -1
        """The step of the last line that is there."""
        self._files = files
        self._timestep = math.nan if timestep is None else timestep
        try:
            end = self._look() if resume and path.exists() else 0
            # What is there is never written again: the disk may be full.
            with path.open("r+b" if end else "wb") as file:
                file.truncate(end)
                file.write(b"" if end else _HEAD)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot go on with {path}: {error}") from error

    def write(self, seen: Observation) -> None:
        """Appends a line.

        Raises:
            FileError: it cannot be written.
        """
        values = (
            *(self._timestep * seen.step, seen.energy, seen.kinetic_energy),
            *(seen.energy + seen.kinetic_energy, seen.temperature),
            *(seen.volume or math.nan, seen.pressure, seen.largest_force),
        )
        words = [str(seen.step), *("" if math.isnan(value) else repr(float(value)) for value in values)]
        try:
            file = self._files.of(self, lambda: self.path.open("ab", buffering=0))
            raw = memoryview((",".join(words) + "\n").encode())
            while raw:
                raw = raw[file.write(raw) :]
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror}") from error
        self.reached = seen.step

    def _look(self) -> int:
        """What is there already; returns where the last whole line ends."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole and not whole.startswith(_HEAD):
            raise ValueError("it has other columns: take it away")
        last = whole.splitlines()[-1].partition(b",")[0] if whole else b""
        self.reached = int(last) if last.isdigit() else -1
        return len(whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the observations of a trajectory come to.

    Attributes:
        count: of them.
        drift: of the total energy in eV/ps: the slope of a straight line through it.
        fluctuation: eV, standard deviation of the total energy around that line.
        temperature: K, mean.
        temperature_spread: K, standard deviation.
        pressure: eV/Å³, mean; NaN if it was not computed.
    """

    count: int
    drift: float
    fluctuation: float
    temperature: float
    temperature_spread: float
    pressure: float

    def words(self, n_atoms: int) -> str:
        """For people; the drift is that of each of so many atoms."""
        said = f"temperature {self.temperature:.1f} ± {self.temperature_spread:.1f} K"
        if self.count > 2:
            said += (
                f", total energy drifts by {1000 * self.drift / n_atoms:+.3g} meV/atom/ps"
                f" and fluctuates by {1000 * self.fluctuation / n_atoms:.2g} meV/atom"
            )
        if math.isfinite(self.pressure):
            said += f", pressure {self.pressure:.3g} eV/Å³"
        return f"{said} ({self.count} observations)"


def summary_of(path: Path) -> Summary | None:
    """What a file of observations comes to; None if it has none."""
    table = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2, encoding="utf-8")
    if not table.size:
        return None
    columns = dict(zip(COLUMNS, table.T, strict=True))
    total, temperature, pressure = (
        columns[name] for name in ("total_energy_eV", "temperature_K", "pressure_eV_per_A3")
    )
    picoseconds = columns["time_fs"] / 1000.0
    slope, around = 0.0, total - total.mean()
    if np.ptp(picoseconds) > 0:
        centred = picoseconds - picoseconds.mean()
        slope = float(centred @ around / (centred @ centred))
        around = around - slope * centred
    known = pressure[np.isfinite(pressure)]
    return Summary(
        count=len(total),
        drift=slope,
        fluctuation=float(around.std()),
        temperature=float(temperature.mean()),
        temperature_spread=float(temperature.std()),
        pressure=float(known.mean()) if len(known) else math.nan,
    )
