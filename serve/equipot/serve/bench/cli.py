"""`equipot bench serve`: a server under fire, as JSON and as a picture."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from equipot.serve.errors import ServeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def bench() -> None:
    """Measure what stands on this machine."""


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="Served for the length of the measurement.")],
    atoms: Annotated[int, typer.Option(min=1, help="Atoms of each structure.")] = 64,
    structures: Annotated[int, typer.Option(min=1, help="Structures of each request.")] = 8,
    loads: Annotated[str, typer.Option(help="Parts of the capacity to offer.")] = "0.5,1,2,10",
    seconds: Annotated[
        float,
        typer.Option(min=0.1, max=86_400, help="For each load, and for each way to find the capacity."),
    ] = 20.0,
    deadline: Annotated[
        float, typer.Option(min=0.001, max=86_400, help="Of each request, in seconds.")
    ] = 2.0,
    threads: Annotated[int | None, typer.Option(help="As for equipot serve.")] = None,
    max_batch_edges: Annotated[int | None, typer.Option(help="By default what calibration finds.")] = None,
    soak_minutes: Annotated[
        float, typer.Option(min=0, max=100_000, help="Mixed load for so long, memory watched.")
    ] = 0.0,
    mutated: Annotated[int, typer.Option(min=0, help="Requests that are wrong somewhere to send.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here (.png, .svg); needs matplotlib.")] = None,
) -> None:
    """Load a server of BUNDLE with what it can answer and with more, and print what became of it as JSON.

    The load comes from this machine and takes its part of the cores: run it while nothing else runs.
    """
    # Only now: torch takes seconds to import, and neither help nor a wrong word should wait for it.
    from equipot.serve.bench.plot import draw
    from equipot.serve.bench.run import Plan, run

    try:
        parts = [float(part) for part in loads.split(",") if part.strip()]
    except ValueError:
        raise ServeError(f"--loads is {loads!r}: give numbers with commas between them") from None
    if not parts or min(parts) <= 0 or not all(map(math.isfinite, parts)):
        raise ServeError(f"--loads is {loads!r}: give positive numbers")
    _check_written(out, plot)
    plan = Plan(
        bundle=bundle,
        atoms=atoms,
        structures=structures,
        loads=parts,
        seconds=seconds,
        deadline=deadline,
        threads=threads,
        batch_edges=max_batch_edges,
        soak_seconds=60 * soak_minutes,
        mutated=mutated,
    )
    report: dict[str, Any] = {
        "what": "serve_under_load",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" numpy {np.__version__}",
        **asyncio.run(run(plan, lambda text: print(text, file=sys.stderr))),  # noqa: T201
    }
    text = json.dumps(report, indent=1)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if plot is not None and report["levels"]:
        draw(plot, report["capacity"]["structures_per_s"], report["levels"])


def _check_written(out: Path | None, plot: Path | None) -> None:
    """Raises ServeError for what could not be written: before minutes of measuring, not after them."""
    for word, path in (("--out", out), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ServeError(f"{word} is {path}: give a file in a folder that is there")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise ServeError(f"--plot is {plot}: give a name that ends in .png, .svg or .pdf")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ServeError("--plot needs matplotlib: pip install matplotlib")
