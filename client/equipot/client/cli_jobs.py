"""`equipot jobs`: work that a server keeps and goes on with by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from equipot.client.errors import ClientError
from equipot.client.job_info import JobInfo
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
from equipot.client.retry import RetryPolicy
from equipot.client.settings import DEFAULT_TIMEOUT
from equipot.client.sync import Client

PATIENT = RetryPolicy(attempts=100)
"""Whoever waits for a job waits for its server, too: minutes, while it is started again."""

Id = Annotated[str, typer.Argument(metavar="ID", help="of the job, as `equipot jobs list` says it")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def connect(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="HOST:PORT of the server")] = "127.0.0.1:50051",
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds for each request")] = DEFAULT_TIMEOUT,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = "",
    token_file: TokenFile = None,
    allow_plaintext_token: AllowPlaintextToken = False,
) -> None:
    """List, fetch and end the jobs that a server started with --jobs keeps for you."""
    trust = shown(
        tls=tls,
        tls_ca=tls_ca,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_name=tls_name,
        token_file=token_file,
        allow_plaintext_token=allow_plaintext_token,
    )
    context.obj = lambda retry=None: trust.client(address, timeout=timeout, retry=retry)


@app.command("list")
def list_jobs(context: typer.Context) -> None:
    """Show your jobs, the newest first."""
    with _client(context) as client:
        jobs = client.jobs.list()
    table = Table(title=f"jobs at {client.address}", title_justify="left")
    for column in ("id", "label", "state", "done", "failed", "model", "submitted", "MiB"):
        table.add_column(column, overflow="fold")
    for info in jobs:
        table.add_row(
            info.id,
            info.label,
            _state(info),
            f"{info.n_done:,} of {info.n_structures:,}",
            f"{info.n_failed:,}",
            info.model.name,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(info.created)),
            f"{info.bytes / 2**20:,.1f}",
        )
    Console().print(table)


@app.command()
def attach(
    context: typer.Context,
    job: Id,
    out: Annotated[Path | None, typer.Option(help="default: ID.extxyz")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="that the job was made of; its frames' own words and numbers go into OUT, too"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on after the frames that OUT or OUT.partial has already")
    ] = False,
) -> None:
    """Write a job's results, in the order of its structures, into an extxyz file; wait for those to come.

    Of dynamics each structure has a trajectory: OUT, or OUT with its number if there are several.
    Ctrl-C ends the waiting, not the job: --resume fetches the rest.
    """
    from equipot.client.frames import FrameReader, UnorderedWriter
    from equipot.client.job_files import Slip, fetch, say_end
    from equipot.client.job_trajectories import fetch_trajectories, say_trajectories

    target, frames = out or Path(f"{job}.extxyz"), None
    if file is not None:
        reader = FrameReader(file)
        frames = list(reader)
        reader.check()
    with _client(context, PATIENT) as client:
        # Nothing is written for a job that is not there.
        kind = client.jobs.get(job).kind
        slip, former = Slip(job, client.address), Slip.read(target)
        if resume and (former is None or former.job != job):
            raise ClientError(f"{target}.partial is not known to be of job {job}: leave --resume out")
        if former is not None and not resume:
            raise ClientError(
                f"job {former.job} fills {target} already, says {Slip.path(target)}: --resume goes on with"
                " it; to begin anew take that file away"
            )
        if former is None:
            slip.write(target)
        else:
            slip = replace(former, address=client.address)
        if kind == "simulate":
            ended, recording = fetch_trajectories(client, slip, target, frames, resume=resume)
            Slip.path(target).unlink(missing_ok=True)
            if not say_trajectories(Console(), ended, recording):
                raise typer.Exit(1)
            return
        with UnorderedWriter(target, resume=resume) as writer:
            info, outcome = fetch(client, slip, target, frames, writer)
        Slip.path(target).unlink(missing_ok=True)
    say_end(Console(), info, outcome, writer.n_written, target)
    if not outcome.is_whole or info.state != "done":
        raise typer.Exit(1)


@app.command()
def cancel(context: typer.Context, job: Id) -> None:
    """End a job; the results that it has stay for some days."""
    with _client(context) as client:
        info = client.jobs.cancel(job)
    _say(f"job {info.id} is {info.state}; it has {info.n_results} results of {info.n_structures} structures")


@app.command()
def delete(context: typer.Context, job: Id) -> None:
    """End a job and have the server forget it with its results."""
    with _client(context) as client:
        client.jobs.delete(job)
    _say(f"job {job} is gone")


@contextmanager
def _client(context: typer.Context, retry: RetryPolicy | None = None) -> Iterator[Client]:
    with context.obj(retry) as client:
        yield client


def _state(info: JobInfo) -> str:
    words = f"{info.state}: {info.reason}" if info.reason else info.state
    if info.remaining_seconds is not None:
        words += f", about {info.remaining_seconds / 60:.0f} min more"
    return words


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)
