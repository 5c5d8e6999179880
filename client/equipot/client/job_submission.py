"""A file's frames as a job, submitted once however often that is begun. Knows no files of results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from equipot.client.cli import Interruption
from equipot.client.errors import ClientError, InvalidRequest, JobNotFound, LimitExceeded
from equipot.client.job_files import Slip
from equipot.client.job_info import JobInfo
from equipot.client.sync import Client

Send = Callable[[Callable[[int], None]], JobInfo]
"""Submits all; what it is given is told how many structures the server has."""


def slip_for(client: Client, target: Path, kind: str, *, resume: bool, asked: str = "") -> tuple[Slip, bool]:
    """The job that fills a file, and whether there was one.

    Raises:
        ClientError: there is one that is not to be gone on with, it is at another server, or it was asked for
            by other words, which would go for nothing.
    """
    slip = Slip.read(target)
    if slip is None:
        return Slip(f"{kind}-{uuid4().hex[:12]}", client.address, asked=asked), False
    if not resume:
        raise ClientError(
            f"job {slip.job} fills {target} already, says {Slip.path(target)}: --resume goes on with it; to"
            " begin anew take that file away"
        )
    if slip.address != client.address:
        raise ClientError(f"job {slip.job} is at {slip.address}, not at {client.address}: give --address")
    if asked and slip.asked and asked != slip.asked:
        raise ClientError(
            f"job {slip.job} was asked for by {slip.asked}, not by {asked}: give those to go on with it; to"
            f" begin anew take {Slip.path(target)} away"
        )
    return slip, True


def submit(client: Client, slip: Slip, target: Path, count: int, send: Send, *, begun: bool) -> None:
    """Submits so many structures unless the server has them all; `begun`: it had them for sure.

    Raises:
        JobNotFound: it has had the job, and has it no more.
    """
    n_sent: int | None = None
    try:
        if client.jobs.get(slip.job).state != "receiving":
            return
    except JobNotFound:
        if begun:
            raise
        n_sent = 0
    # First the slip: whoever is stopped while it submits must know what it has submitted.
    slip.write(target)
    errors = Console(stderr=True)
    columns = (TextColumn("submitting"), BarColumn(), MofNCompleteColumn())
    with (
        Interruption(errors) as interruption,
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
    ):
        task = bar.add_task("submitting", total=count)

        def sent(count: int) -> None:
            nonlocal n_sent
            n_sent = count
            bar.update(task, completed=count)
            interruption.check()

        try:
            info = send(sent)
        except (InvalidRequest, LimitExceeded):
            if n_sent == 0:
                # There is no job: whoever asks again, asks anew.
                Slip.path(target).unlink(missing_ok=True)
            raise
    for warning in info.warnings:
        errors.print(f"note: {warning}", soft_wrap=True, highlight=False, markup=False)
    Console().print(f"job {slip.job}: {count} structures", soft_wrap=True, highlight=False, markup=False)
