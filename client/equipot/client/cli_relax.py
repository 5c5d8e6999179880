"""The verb `equipot relax`: every structure of a file to where its forces vanish, on a server."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipot.client.cli import DEFAULT_ADDRESS, Address, Interruption, Timeout
from equipot.client.errors import ClientError, describe
from equipot.client.options import (
    AllowPlaintextToken,
    TlsCa,
    TlsCert,
    TlsKey,
    TlsName,
    TokenFile,
    UseTls,
    shown,
)
from equipot.client.relax import Relaxed
from equipot.client.settings import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from ase import Atoms

    from equipot.client.frames import FrameWriter

_MOST_FAILURES = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def relax(
    file: Annotated[Path, typer.Argument(help="any file ASE reads; all its frames")],
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="name or name@digest; default: the server's")] = "",
    level_of_theory: Annotated[str, typer.Option(help="one of the model's; default: its only one")] = "",
    out: Annotated[Path | None, typer.Option(help="default: FILE's name with -relaxed.extxyz")] = None,
    fmax: Annotated[float, typer.Option(help="largest force of a relaxed structure, eV/Å")] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="after which a structure is given up")] = 500,
    optimizer: Annotated[Literal["fire", "lbfgs"], typer.Option(help="as ASE has it")] = "fire",
    cell: Annotated[
        Literal["fixed", "full", "isotropic", "constant_volume"],
        typer.Option(help="whether and how the cell moves along"),
    ] = "fixed",
    pressure: Annotated[float, typer.Option(help="upon a cell whose volume moves, eV/Å³")] = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on after the frames that OUT.partial has already")
    ] = False,
    timeout: Timeout = DEFAULT_TIMEOUT,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
) -> None:
    """Relax every frame of a file on the server and write the results, in order, into an extxyz file.

    Atoms that a FixAtoms constraint of the file holds stay. Frames that cannot be relaxed are written where
    they began, with the reason in `equipot_failure`; those that ran out of steps have `equipot_converged` F;
    the exit code is then 1. A run that is stopped leaves its finished frames in OUT.partial for --resume.
    """
    from equipot.client.frames import FrameReader, FrameWriter

    trust = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    )
    target = out or Path(f"{file.stem}-relaxed.extxyz")
    if target.exists() and file.exists() and target.samefile(file):
        raise ClientError(f"{target} is the input itself: give another --out")
    reader = FrameReader(file)
    frames = list(reader)
    reader.check()
    console = Console()
    with FrameWriter(target, resume=resume) as writer:
        done = writer.n_written
        if done > len(frames):
            raise ClientError(
                f"{writer.partial} has {done} frames, {file} has {len(frames)}: it is another run's"
            )
        if done:
            console.print(
                f"going on after {done} frames of {writer.partial}", soft_wrap=True, highlight=False
            )
        report = _Report(frames, writer, _Outcome())
        with trust.client(address, model=model, timeout=timeout) as client:
            relaxing = client.relax_iter(
                frames[done:],
                level_of_theory=level_of_theory,
                fmax=fmax,
                steps=steps,
                optimizer=optimizer,
                cell=cell,
                pressure=pressure,
            )
            errors = Console(stderr=True)
            with (
                Interruption(errors) as interruption,
                Progress(
                    TextColumn("relaxing"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    console=errors,
                    transient=True,
                    disable=not errors.is_terminal,
                ) as bar,
                closing(relaxing),
            ):
                task = bar.add_task("relaxing", total=len(frames), completed=done)
                for index, relaxed in relaxing:
                    report.add(done + index, relaxed)
                    bar.advance(task)
                    interruption.check()
    _say(console, report.outcome, len(frames), target)
    if report.outcome.failed or report.outcome.unconverged:
        raise typer.Exit(1)


@dataclass(slots=True)
class _Outcome:
    """What a run came to."""

    failed: int = 0
    unconverged: int = 0
    steps: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Report:
    """Writes results in the order of the file, whatever the order in which they come."""

    frames: list[Atoms]
    writer: FrameWriter
    outcome: _Outcome
    early: dict[int, Relaxed] = field(default_factory=dict)

    def add(self, index: int, relaxed: Relaxed) -> None:
        """Takes one result; writes it, and those that waited for it, if it is its turn."""
        self.early[index] = relaxed
        while (now := self.writer.n_written) in self.early:
            self._write(now, self.early.pop(now))

    def _write(self, index: int, relaxed: Relaxed) -> None:
        from equipot.client.frames import with_relaxed

        self.writer.write(with_relaxed(self.frames[index], relaxed))
        self.outcome.steps += relaxed.steps
        if relaxed.failure is not None:
            self.outcome.failed += 1
            if len(self.outcome.failures) < _MOST_FAILURES:
                self.outcome.failures.append(f"frame {index}: {describe(relaxed.failure)}")
        elif not relaxed.converged:
            self.outcome.unconverged += 1


def _say(console: Console, outcome: _Outcome, n_frames: int, target: Path) -> None:
    for failure in outcome.failures:
        console.print(f"[red]failed:[/] {escape(failure)}", soft_wrap=True, highlight=False)
    if outcome.failed > len(outcome.failures):
        console.print(f"… and {outcome.failed - len(outcome.failures)} more: see equipot_failure in {target}")
    good = n_frames - outcome.failed - outcome.unconverged
    words = [f"{good} of {n_frames} relaxed"]
    words += [f"{outcome.unconverged} ran out of steps"] if outcome.unconverged else []
    words += [f"{outcome.failed} failed"] if outcome.failed else []
    console.print(f"{', '.join(words)}; {outcome.steps} steps", soft_wrap=True, highlight=False)
    console.print(f"results: {target}", soft_wrap=True, highlight=False, markup=False)
