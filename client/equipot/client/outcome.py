"""What a run over a file of structures came to, for whoever reads the command line. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from equipot.client.certainty import OUTSIDE, Tally
from equipot.client.errors import describe
from equipot.client.relax import Relaxed

_MOST_FAILURES = 20


@dataclass(slots=True)
class Outcome:
    """What relaxations came to.

    Attributes:
        failed: how many could not go on.
        unconverged: how many ran out of steps.
        steps: of all together, in this run.
        failures: the first of them, in words.
        certainty: how sure the answers are.
    """

    failed: int = 0
    unconverged: int = 0
    steps: int = 0
    failures: list[str] = field(default_factory=list)
    certainty: Tally = field(default_factory=Tally)

    @property
    def is_whole(self) -> bool:
        """Whether all came to rest."""
        return not (self.failed or self.unconverged)

    def add(self, place: int, relaxed: Relaxed) -> None:
        """Takes one result into account."""
        self.steps += relaxed.steps
        self.certainty.add(relaxed.uncertainty)
        if relaxed.failure is not None:
            self.failed += 1
            if len(self.failures) < _MOST_FAILURES:
                failure = replace(relaxed.failure, index=place)
                self.failures.append(describe(failure))
        elif not relaxed.converged:
            self.unconverged += 1

    def recall(self, comment: str) -> None:
        """Takes a result of an earlier run into account, as it was written."""
        self.failed += "equipot_failure=" in comment
        self.unconverged += "equipot_converged=F" in comment
        self.certainty.n_outside += f"{OUTSIDE}=" in comment

    def print(self, console: Console, n_frames: int, target: Path) -> None:
        """Says what failed, how many did not, and where all of it is."""
        for failure in self.failures:
            console.print(f"[red]failed:[/] {escape(failure)}", soft_wrap=True, highlight=False)
        if self.failed > len(self.failures):
            console.print(f"… and {self.failed - len(self.failures)} more: see equipot_failure in {target}")
        for line in self.certainty.lines():
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        good = n_frames - self.failed - self.unconverged
        words = [f"{good} of {n_frames} relaxed"]
        words += [f"{self.unconverged} ran out of steps"] if self.unconverged else []
        words += [f"{self.failed} failed"] if self.failed else []
        console.print(f"{', '.join(words)}; {self.steps} steps", soft_wrap=True, highlight=False)
        console.print(f"results: {target}", soft_wrap=True, highlight=False, markup=False)
