"""Which frames belong together, so that near-copies never end up on both sides of a split.

A group is a 63-bit number made from text alone: no table to keep, the same in every import.
"""

import hashlib
from dataclasses import dataclass

from equipot.train.errors import DataError
from equipot.train.sources.base import Frame, FrameError, Reason

AUTO_KEYS = (
    "group",
    "group_id",
    "trajectory",
    "trajectory_id",
    "traj_id",
    "mol_id",
    "molecule_id",
    "molecule",
    "sid",
    "system_id",
    "material_id",
    "mp_id",
)
"""Keys that name a trajectory, a molecule or a material. Keys that may name a single frame, as config_id, or
a whole class of structures, as config_type, are not among them."""
AUTO_BLOCK = 10
RULES = "auto, frame, formula, file, block:N or info:KEY"


@dataclass(frozen=True, slots=True)
class GroupRule:
    """A rule of `--group-by`.

    auto: by the first of `AUTO_KEYS` that a frame has, else block:10.
    frame: every frame alone. formula: by composition. file: by file.
    block:N: N consecutive frames of one file, and of one composition.
    info:KEY: by a value in the frame's info; a frame without it is left out.

    Values of keys and formulas mean the same group in every file; blocks and files are of one file.
    """

    text: str
    kind: str
    block: int = 0
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> "GroupRule":
        """From the command line's word; DataError if there is no such rule."""
        kind, _, value = text.partition(":")
        if kind in ("frame", "formula", "file") and not value:
            return cls(text, kind)
        if kind == "auto" and not value:
            return cls(text, kind, block=AUTO_BLOCK)
        if kind == "block" and value.isdigit() and int(value) > 0:
            return cls(text, kind, block=int(value))
        if kind == "info" and value:
            return cls(text, kind, key=value)
        raise DataError(f"--group-by {text}: give one of {RULES}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys the reader has to look for."""
        return AUTO_KEYS if self.kind == "auto" else (self.key,) if self.key else ()

    def group_of(self, frame: Frame, source: str) -> tuple[int, str]:
        """(group of a frame, what it was made from); `source` is the checksum of the frame's file.

        Raises:
            FrameError: the frame lacks the key that the rule names.
        """
        if frame.group is not None and self.keys:
            key, value = frame.group
            return _number(f"{key}={value}"), f"info:{key}"
        if self.kind == "info":
            raise FrameError(Reason.NO_GROUP, f"its info has no {self.key!r}")
        if self.kind == "file":
            return _number(f"file {source}"), "file"
        if self.kind == "frame":
            return _number(f"frame {source} {frame.index}"), "frame"
        formula = _composition(frame)
        if self.kind == "formula":
            return _number(f"formula {formula}"), "formula"
        block = frame.index // self.block
        return _number(f"block {source} {self.block} {block} {formula}"), f"block:{self.block}"


def _composition(frame: Frame) -> str:
    counts: dict[int, int] = {}
    for number in frame.atomic_numbers.tolist():
        counts[number] = counts.get(number, 0) + 1
    return " ".join(f"{z}:{n}" for z, n in sorted(counts.items()))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
