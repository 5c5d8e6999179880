"""``equipot export``: a checkpoint becomes a bundle that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Directory of a run, as `equipot train --out` made it; of several runs that differ in their "
            "seeds alone an ensemble is made."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the bundle to be written.")],
    checkpoint: Annotated[
        str, typer.Option(help="best (by validation), last, or a name as step-00000120.")
    ] = "best",
    name: Annotated[
        str | None, typer.Option(help="Name of the model; if absent, the bundle directory's.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The weights themselves, not their moving average.")
    ] = False,
    test: Annotated[
        bool,
        typer.Option(
            "--test/--no-test",
            help="Compute the errors on the test split, which takes a whole model's memory; the bundle "
            "itself is written in that of the largest tensor.",
        ),
    ] = True,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Measure on the validation split how sure its answers are, and keep what training has seen; "
            "by default if --test.",
        ),
    ] = None,
) -> None:
    """Turn a checkpoint of any ZeRO stage and number of ranks into a bundle, tested on the test split."""
    from equipot.train.export import export_runs

    export_runs(
        runs,
        out,
        checkpoint=checkpoint,
        name=name or out.name,
        raw=raw,
        test=test,
        calibrate=calibrate,
    )
