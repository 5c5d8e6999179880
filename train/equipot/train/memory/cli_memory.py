"""``equipot memory``: what a run will take, predicted, and measured in a few real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from equipot.train.finetune import with_architecture
from equipot.train.long_work import progress_bar
from equipot.train.recipe import Recipe, RecipeError, check_combination, load_recipe
from equipot.train.sections import parse_bytes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

RecipeFile = Annotated[Path, typer.Argument(help="TOML recipe, as `equipot train` takes it.")]
Ranks = Annotated[int, typer.Option(help="Processes on this machine.", min=1)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, as in model.width=1024."),
]


@app.callback()
def memory() -> None:
    """Predict and measure the memory and time of a training run."""


@app.command()
def plan(
    recipe: RecipeFile,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="To fit in, as 24GiB; if absent, what this machine has free."),
    ] = None,
    ranks: Ranks = 1,
    write: Annotated[
        Path | None, typer.Option(help="Write the recipe with the proposed changes here.")
    ] = None,
    set_: Changes = None,
) -> None:
    """Predict peak memory and time per step of a recipe and its neighbours; propose the cheapest that fits.

    All compute the same step. Nothing is trained; the data are looked at, and a second each goes into
    measuring the machine.
    """
    settings = _load(recipe, ranks, set_)
    wanted = None if memory is None else _bytes(memory)
    from equipot.train.memory import planning, report

    with progress_bar() as bar:
        task = bar.add_task("measuring the machine", total=None)
        plan = planning.make_plan(
            settings, ranks, wanted, on_progress=lambda text: bar.update(task, description=text)
        )
    console = Console(highlight=False)
    console.print(report.plan_table(plan))
    proposal = planning.proposal(plan)
    for line in report.proposal_lines(plan, proposal):
        console.print(escape(line), soft_wrap=True)
    if write is not None:
        report.write_recipe(proposal.recipe, write)
        console.print(escape(f"written: {write}; train it with: equipot train {write} --ranks {ranks}"))


@app.command()
def profile(
    recipe: RecipeFile,
    ranks: Ranks = 1,
    steps: Annotated[int, typer.Option(help="Real steps of each run.", min=2)] = 4,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Measure it as it is, with checkpointing, and with checkpointing and ZeRO, in its form of "
            "the messages and in the plain one.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory for report and figure.")] = Path("memory-profile"),
    set_: Changes = None,
) -> None:
    """Measure memory and time in a few real steps in real ranks, beside what is predicted.

    Nothing of the training is kept. Memory is that of all ranks, sampled from outside; on a GPU it is what
    torch allocates there.
    """
    settings = _load(recipe, ranks, set_)
    from equipot.train.memory import profile as profiling
    from equipot.train.memory import report

    runs = profiling.paper_runs(settings, ranks, plain=True) if table else [(recipe.stem, settings, ranks)]
    done: list[profiling.Profile] = []
    with progress_bar() as bar:
        task = bar.add_task("", total=len(runs))
        for name, each, n in runs:
            machine = done[0].machine if done else None
            done.append(
                profiling.profile(
                    each,
                    n,
                    name=name,
                    steps=steps,
                    machine=machine,
                    say=lambda text: bar.update(task, description=text),
                )
            )
            bar.advance(task)
    console = Console(highlight=False)
    console.print(report.profile_table(done))
    if table:
        console.print(report.comparison_table(done))
    for line in report.save(done, out, table=table):
        console.print(escape(line), soft_wrap=True)


def _load(path: Path, ranks: int, changes: list[str] | None) -> Recipe:
    recipe = with_architecture(load_recipe(path, changes or []))
    check_combination(recipe, ranks)
    for store in recipe.data.stores:
        if not store.is_dir():
            raise RecipeError(f"{path}: data.stores names {store}, which is no directory")
    return recipe


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise RecipeError(f"--memory {text}: {error}") from None
