"""``equipot ensemble`` and ``equipot calibrate``: bundles become one, and learn how sure they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ensemble_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
calibrate_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option(help="Directory of the bundle to be written.")]
Name = Annotated[str, typer.Option(help="Name of the model; if absent, that of the (first) bundle.")]
_DATA = "Directory of a run or a mix: the data that the bundle was trained on."


@ensemble_app.command()
def ensemble(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles that differ in their weights alone.")],
    out: Out,
    name: Name = "",
    data: Annotated[
        Path | None, typer.Option(help=f"{_DATA} Without it the ensemble is not calibrated.")
    ] = None,
) -> None:
    """Join bundles into one: their mean is the prediction, their spread says how far they agree."""
    from equipot.train.uncertainty.join import join_bundles

    join_bundles(bundles, out, name=name, data=data)


@calibrate_app.command()
def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The bundle; it stays as it is.")],
    out: Out,
    data: Annotated[Path, typer.Option(help=_DATA)],
    name: Name = "",
) -> None:
    """Measure how sure a bundle's answers are, into a new bundle; draws OUT-reliability.png beside it."""
    from equipot.train.uncertainty.join import join_bundles

    join_bundles([bundle], out, name=name, data=data)
