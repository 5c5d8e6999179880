"""The verb `equipot relax`: every structure of a file to where its forces vanish, on a server."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

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
    from equipot.client.frames import FrameReader, UnorderedWriter, with_relaxed

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
    with UnorderedWriter(target, resume=resume) as writer:
        if writer.kept and max(writer.kept) >= len(frames):
            raise ClientError(
                f"{writer.partial} has frame {max(writer.kept)}, {file} has {len(frames)} frames"
            )
        todo = [place for place in range(len(frames)) if place not in writer.kept]
        if writer.kept:
            done = f"going on after {len(writer.kept)} frames of {writer.partial}"
            console.print(done, soft_wrap=True, highlight=False)
        outcome = _Outcome()
        for comment in writer.kept.values():
            outcome.recall(comment)
        with trust.client(address, model=model, timeout=timeout) as client:
            relaxing = client.relax_iter(
                [frames[place] for place in todo],
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
                task = bar.add_task("relaxing", total=len(frames), completed=len(frames) - len(todo))
                for index, relaxed in relaxing:
                    place = todo[index]
                    outcome.add(place, relaxed)
                    writer.add(place, with_relaxed(frames[place], relaxed))
                    bar.advance(task)
                    interruption.check()
    _say(console, outcome, len(frames), target)
    if outcome.failed or outcome.unconverged:
        raise typer.Exit(1)


@dataclass(slots=True)
class _Outcome:
    """What a run came to."""

    failed: int = 0
    unconverged: int = 0
    steps: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, place: int, relaxed: Relaxed) -> None:
        """Takes one result into account."""
        self.steps += relaxed.steps
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
