"""The verb `equipot md`: molecular dynamics of a file's frames on a server, written as they come."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipot.client.certainty import Uncertainty
from equipot.client.cli import DEFAULT_ADDRESS, Address, Interruption, Timeout
from equipot.client.cli_jobs import PATIENT
from equipot.client.dynamics import Begun, Ended, IntegratorName, SimulateWords
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
from equipot.client.settings import DEFAULT_TIMEOUT
from equipot.client.sync import Client

if TYPE_CHECKING:
    from ase import Atoms

    from equipot.client.job_info import JobInfo
    from equipot.client.trajectory_file import TrajectoryFile

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def md(
    file: Annotated[Path, typer.Argument(help="any file ASE reads; each of its frames is moved")],
    steps: Annotated[int, typer.Option(min=1, help="in all, those of an earlier part included")],
    address: Address = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option(help="name or name@digest; default: the server's")] = "",
    level_of_theory: Annotated[str, typer.Option(help="one of the model's; default: its only one")] = "",
    out: Annotated[
        Path | None, typer.Option(help="extxyz, or .traj; default: FILE's name with -md.extxyz")
    ] = None,
    integrator: Annotated[IntegratorName, typer.Option(help="as ASE has it")] = "velocity_verlet",
    timestep: Annotated[float, typer.Option(help="fs")] = 1.0,
    temperature: Annotated[float, typer.Option(help="K, of the bath and of drawn velocities")] = 0.0,
    final_temperature: Annotated[
        float | None, typer.Option(help="K, to which a langevin or bussi bath goes linearly")
    ] = None,
    friction: Annotated[float | None, typer.Option(help="1/fs, of a langevin bath; default 0.01")] = None,
    thermostat_time: Annotated[float | None, typer.Option(help="fs; default: 100 steps")] = None,
    pressure: Annotated[float, typer.Option(help="eV/Å³, upon a cell that moves")] = 0.0,
    barostat_time: Annotated[float | None, typer.Option(help="fs; default: 1000 steps")] = None,
    seed: Annotated[int | None, typer.Option(help="of what is drawn; frame i has SEED + i")] = None,
    frame_every: Annotated[int, typer.Option(min=0, help="steps between frames; 0: only the last")] = 100,
    observe_every: Annotated[
        int, typer.Option(min=0, help="steps between lines of OUT's name with .csv; 0: none")
    ] = 10,
    forces: Annotated[bool, typer.Option("--forces", help="write forces, too")] = False,
    stress: Annotated[bool, typer.Option("--stress", help="write the stress, too")] = False,
    uncertainty: TellUncertainty = False,
    coverage: Coverage = 0.9,
    refuse_outside: RefuseOutside = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what OUT and OUT.token have")] = False,
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
    """Move every frame of a file in time on the server and write its trajectory as it comes.

    Momenta in the file count; where there are none, velocities are drawn at --temperature. Atoms that a
    FixAtoms constraint holds stay. Of several frames each has a file of its own, OUT with its number.
    Energies, temperature and pressure by step go into OUT.csv. What cannot go on is written up to the frame
    that failed, with the reason in `equipot_failure`, and the exit code is 1. A run that is stopped goes on
    by --resume with the same words, as if it had never been, and so does one that failed for want of a server
    or of the right words. With --job a server that was started with --jobs
    keeps the work and its frames: Ctrl-C only detaches.
    """
    from equipot.client.frames import FrameReader
    from equipot.client.job_files import Slip
    from equipot.client.job_trajectories import trajectory_paths
    from equipot.client.open_files import OpenFiles
    from equipot.client.recording import Recording

    trust = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    )
    reader = FrameReader(file)
    frames = list(reader)
    reader.check()
    target = out or Path(f"{file.stem}-md.extxyz")
    paths = trajectory_paths(target, len(frames))
    if any(path.exists() and path.samefile(file) for path in paths):
        raise ClientError(f"{file} is the input itself: give another --out")
    errors, console = Console(stderr=True), Console()
    sure = certainty_wanted(uncertainty=uncertainty, coverage=coverage, refuse_outside=refuse_outside)
    how = SimulateWords(
        integrator=integrator,
        timestep=timestep,
        temperature=temperature,
        final_temperature=final_temperature,
        friction=friction,
        thermostat_time=thermostat_time,
        pressure=pressure,
        barostat_time=barostat_time,
        frame_every=frame_every,
        observe_every=observe_every,
        forces=forces,
        stress=stress,
    )
    if job:
        how["seed"] = seed
        with trust.client(address, model=model, timeout=timeout, retry=PATIENT) as client:
            _as_job(client, file, frames, target, steps, model, level_of_theory, sure, how, resume=resume)
        return
    if (slip := Slip.read(target)) is not None:
        raise ClientError(
            f"job {slip.job} fills {target}, says {Slip.path(target)}: give --job --resume to go on with"
            " it; to begin anew take that file away"
        )
    with ExitStack() as stack:
        recording = Recording(
            paths,
            stack.enter_context(OpenFiles()),
            timestep=timestep,
            resume=resume,
        )
        ways = [recording.trajectory(place) for place in range(len(frames))]
        todo = [place for place, way in enumerate(ways) if way.reached < steps and not way.failure]
        for way in ways:
            if way.reached == steps:
                # Whoever was killed at the very end has left its token.
                way.finish()
        resumed = [recording.resumed(place) for place in todo]
        client = stack.enter_context(trust.client(address, model=model, timeout=timeout))
        seeds = [_seed_of(ways[place], seed, place) for place in todo]
        how["seed"] = [secrets.randbits(48) if one is None else one for one in seeds]
        simulating = client.simulate_iter(
            [frames[place] for place in todo],
            steps=steps,
            level_of_theory=level_of_theory,
            uncertainty=sure,
            resume=resumed if resume else None,
            on_warning=lambda warning: errors.print(f"[yellow]note:[/] {escape(warning)}", soft_wrap=True),
            **how,
        )
        interruption = stack.enter_context(Interruption(errors))
        bar = stack.enter_context(_progress(errors))
        stack.enter_context(closing(simulating))
        done, model = steps * (len(frames) - len(todo)), ""
        task = bar.add_task("moving", total=steps * len(frames), completed=done)
        reached: dict[int, int] = {}
        for index, told in simulating:
            place = todo[index]
            if isinstance(told, Begun):
                model = told.model.pinned
            recording.take(place, frames[place], told, model, seeds[index])
            if not isinstance(told, Begun):
                reached[place] = told.steps if isinstance(told, Ended) else told.step
            bar.update(task, completed=done + sum(reached.values()))
            interruption.check()
    lines = [
        *(f"failed: {why}" for _, why in sorted(recording.failed.items())),
        *recording.to_go_on(),
        *recording.certainty.lines(),
        *recording.summaries(),
        f"{len(frames) - len(recording.failed)} of {len(frames)} moved for {steps} steps",
        *recording.where(),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if recording.failed:
        raise typer.Exit(1)


def _seed_of(way: TrajectoryFile, seed: int | None, place: int) -> int | None:
    """Of a structure: that with which it has begun, that which is asked for, or any; None: nobody knows."""
    if way.seed is not None or way.restart:
        return way.seed
    return secrets.randbits(48) if seed is None else seed + place


def _as_job(
    client: Client,
    file: Path,
    frames: list[Atoms],
    target: Path,
    steps: int,
    model: str,
    level_of_theory: str,
    sure: bool | Uncertainty,
    how: SimulateWords,
    *,
    resume: bool,
) -> None:
    """Submits the frames unless that was done before, and fetches what there is until all is there."""
    from equipot.client.frames import sum_of
    from equipot.client.job_files import Slip
    from equipot.client.job_submission import slip_for, submit
    from equipot.client.job_trajectories import fetch_trajectories, say_trajectories, trajectory_paths

    asked = as_words({"steps": steps, **how}, model, level_of_theory, sure)
    asked = f"{asked} for structures {sum_of(frames)}"
    slip, known = slip_for(client, target, "md", resume=resume, asked=asked)
    for path in trajectory_paths(target, len(frames)):
        if not known and (path.with_name(path.name + ".token").exists() or (resume and path.exists())):
            raise ClientError(f"{path} was begun without a job: leave --job out to go on with it")

    def send(sent: Callable[[int], None]) -> JobInfo:
        return client.jobs.simulate(
            frames,
            steps=steps,
            id=slip.job,
            label=file.name,
            level_of_theory=level_of_theory,
            uncertainty=sure,
            on_sent=sent,
            **how,
        )

    submit(client, slip, target, len(frames), send, begun=slip.after > 0)
    info, recording = fetch_trajectories(client, slip, target, frames, resume=resume)
    Slip.path(target).unlink(missing_ok=True)
    if not say_trajectories(Console(), info, recording):
        raise typer.Exit(1)


def _progress(errors: Console) -> Progress:
    return Progress(
        TextColumn("moving"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
