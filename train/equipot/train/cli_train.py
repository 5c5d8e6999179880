"""``equipot train``: checks the recipe, then starts the ranks or joins those that are there."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from equipot.train.finetune import with_architecture
from equipot.train.launch import GRACE_SECONDS, PEER_SECONDS, in_a_launched_rank, launch
from equipot.train.recipe import Recipe, RecipeError, check_combination, load_recipe
from equipot.train.run_card import RunCard
from equipot.train.run_directory import RunDirectory, RunError
from equipot.train.slurm import slurm_environment
from equipot.train.worker import Job, StopRequest, end_with_parent, work

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe; its paths are relative to this directory.")],
    ranks: Annotated[int, typer.Option(help="Processes to train with on this machine.", min=1)] = 1,
    launcher: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Start ranks on this machine, or as workers of a Ray cluster (RAY_ADDRESS)."),
    ] = "local",
    out: Annotated[
        Path | None, typer.Option(help="Directory of the run; if absent, runs/ and the recipe's name.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that directory.")] = False,
    restarts: Annotated[
        int, typer.Option(help="How often to go on from the last checkpoint when ranks died.", min=0)
    ] = 0,
    grace: Annotated[
        float, typer.Option(help="Seconds in which ranks have to save and end when asked to.", min=0)
    ] = GRACE_SECONDS,
    peer_timeout: Annotated[
        float, typer.Option(help="Seconds without a sign of life after which another machine is lost.", min=1)
    ] = PEER_SECONDS,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as in optimizer.epochs=20."),
    ] = None,
) -> None:
    """Train a potential as a recipe says.

    Starts --ranks processes of its own, or joins those that torchrun, deepspeed or srun has started.

    Ctrl-C, SIGTERM and SIGUSR1 save and end the run; --resume continues it.
    """
    directory = out or Path("runs") / recipe.stem
    os.environ.update(slurm_environment(os.environ))
    joining = in_a_launched_rank()
    if joining and restarts:
        raise RecipeError(
            "--restarts is for ranks that are started here; torchrun has --max-restarts, Slurm requeues"
        )
    size = int(os.environ["WORLD_SIZE"]) if joining else ranks
    settings = _with_architecture(load_recipe(recipe, set_ or []), RunDirectory(directory))
    check_combination(settings, size)
    for key, paths, verb in (("stores", settings.data.stores, "import"), ("mix", [settings.data.mix], "mix")):
        for path in paths:
            if path is not None and not path.is_dir():
                raise RecipeError(
                    f"{recipe}: data.{key} names {path}, which is no directory (relative paths are relative "
                    f"to {Path.cwd()}); make it with `equipot data {verb}`"
                )
    if not resume and RunDirectory(directory).has_checkpoints and not joining:
        raise RunError(f"{directory} already holds a run; continue it with --resume, or choose another --out")
    job = Job(recipe=settings, out=directory, resume=resume, peer_timeout=peer_timeout)
    if launcher == "ray" and not joining:
        if importlib.util.find_spec("ray") is None:
            raise RecipeError('--launcher ray needs Ray: pip install "equipot[ray]"')
        from equipot.train.ray_train import launch_on_ray  # an extra

        launch_on_ray(job, ranks=ranks, restarts=restarts)
    elif joining or (size == 1 and not restarts):
        stop = StopRequest()
        stop.listen()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(os.getppid())
        work(job, stop)
    else:
        launch(
            "equipot.train.worker",
            [job.to_json()],
            ranks=ranks,
            logs=RunDirectory(directory).logs,
            grace=grace,
            restarts=restarts,
            again=[replace(job, resume=True).to_json()],
        )


def _with_architecture(recipe: Recipe, run: RunDirectory) -> Recipe:
    begun = recipe.finetune is not None and run.has_checkpoints
    return with_architecture(recipe, RunCard.read(run.card).recipe if begun else None)
