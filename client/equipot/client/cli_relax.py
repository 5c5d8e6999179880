"""The verb `equipot relax`: every structure of a file to where its forces vanish, on a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipot.client.certainty import Uncertainty
from equipot.client.cli import DEFAULT_ADDRESS, Address, Interruption, Timeout
from equipot.client.cli_jobs import PATIENT
from equipot.client.errors import ClientError
from equipot.client.options import (
    AllowPlaintextToken,
    Coverage,
    RefuseOutside,
    TellUncertainty,
    TlsCa,
    TlsCert,
    TlsKey,
    TlsName,
    TokenFile,
    UseTls,
    as_words,
    certainty_wanted,
    shown,
)
from equipot.client.outcome import Outcome
from equipot.client.relax import RelaxWords
from equipot.client.settings import DEFAULT_TIMEOUT
from equipot.client.sync import Client

if TYPE_CHECKING:
    from ase import Atoms

    from equipot.client.job_info import JobInfo

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
    uncertainty: TellUncertainty = False,
    coverage: Coverage = 0.9,
    refuse_outside: RefuseOutside = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on after the frames that OUT.partial has already")
    ] = False,
    job: Annotated[
        bool,
        typer.Option("--job", help="submit it: the server goes on whether we are connected or not"),
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
    With --job a server that was started with --jobs keeps the work and its results: Ctrl-C only detaches.
    """
    from equipot.client.frames import FrameReader, UnorderedWriter, sum_of, with_relaxed

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
    how = RelaxWords(fmax=fmax, steps=steps, optimizer=optimizer, cell=cell, pressure=pressure)
    sure = certainty_wanted(uncertainty=uncertainty, coverage=coverage, refuse_outside=refuse_outside)
    asked = f"{as_words(how, model, level_of_theory, sure)} for structures {sum_of(frames)}"
    if job:
        with trust.client(address, model=model, timeout=timeout, retry=PATIENT) as client:
            _as_job(client, file, frames, target, level_of_theory, sure, how, resume=resume, asked=asked)
        return
    with UnorderedWriter(target, resume=resume, asked=asked) as writer:
        if writer.kept and max(writer.kept) >= len(frames):
            raise ClientError(
                f"{writer.partial} has frame {max(writer.kept)}, {file} has {len(frames)} frames"
            )
        todo = [place for place in range(len(frames)) if place not in writer.kept]
        if writer.kept:
            done = f"going on after {len(writer.kept)} frames of {writer.partial}"
            console.print(done, soft_wrap=True, highlight=False)
        outcome = Outcome()
        for comment in writer.kept.values():
            outcome.recall(comment)
        # As within a run: all come from one bundle, whatever its name stands for by now.
        with trust.client(address, model=writer.model or model, timeout=timeout) as client:
            relaxing = client.relax_iter(
                [frames[place] for place in todo], level_of_theory=level_of_theory, uncertainty=sure, **how
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
    outcome.print(console, len(frames), target)
    if not outcome.is_whole:
        raise typer.Exit(1)


def _as_job(
    client: Client,
    file: Path,
    frames: list[Atoms],
    target: Path,
    level_of_theory: str,
    sure: bool | Uncertainty,
    how: RelaxWords,
    *,
    resume: bool,
    asked: str,
) -> None:
    """Submits the frames unless that was done before, and fetches what there is until all is there."""
    from equipot.client.frames import UnorderedWriter
    from equipot.client.job_files import Slip, fetch, say_end
    from equipot.client.job_submission import slip_for, submit

    slip, known = slip_for(client, target, "relax", resume=resume, asked=asked)

    def send(sent: Callable[[int], None]) -> JobInfo:
        return client.jobs.relax(
            frames,
            id=slip.job,
            label=file.name,
            level_of_theory=level_of_theory,
            uncertainty=sure,
            on_sent=sent,
            **how,
        )

    with UnorderedWriter(target, resume=resume) as writer:
        if writer.kept and not known:
            raise ClientError(f"{writer.partial} was begun without a job: leave --job out to go on with it")
        submit(client, slip, target, len(frames), send, begun=bool(writer.kept))
        info, outcome = fetch(client, slip, target, frames, writer)
    Slip.path(target).unlink(missing_ok=True)
    say_end(Console(), info, outcome, writer.n_written, target)
    if not outcome.is_whole or info.state != "done":
        raise typer.Exit(1)
