"""One call of ``equipot scaling run``: from a declaration to points, to workers, to what the user is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from equipot.train.long_work import told_bar
from equipot.train.scaling.data import left_out, prepare_data
from equipot.train.scaling.declaration import Study
from equipot.train.scaling.declared import check_grown, remember
from equipot.train.scaling.folder import StudyFolder, read_json, write_json
from equipot.train.scaling.grid import wishes
from equipot.train.scaling.order import in_order, parse_budget, shared, within
from equipot.train.scaling.planning import Planned, plan
from equipot.train.scaling.runner import Standing, duration, failures, run_points, standing
from equipot.train.scaling.speed import Speed
from equipot.train.scaling.worker import Assignment

STOPPED = 130
"""Exit code of a study that was asked to stop."""
PARTLY = 1
"""Exit code of a study of which some points failed, or are left as the budget was spent."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which points of a study a call is about."""

    only: tuple[str, ...] = ()
    budget: str | None = None
    share: str = "1/1"


@dataclass(frozen=True, slots=True)
class Begun:
    """A study that is ready to be run."""

    work: Assignment
    points: Sequence[Planned]
    """In order."""
    beyond: int
    """Points that the budget of FLOPs does not cover."""


def begin(
    study: Study,
    folder: StudyFolder,
    choice: Choice,
    began: float,
    stopped: Sequence[int],
    console: Console,
) -> Begun:
    """Import the data if need be, and plan the points; nothing is declared yet.

    Raises:
        TrainError: what is declared cannot be run.
    """
    flops, seconds = (None, None) if choice.budget is None else parse_budget(choice.budget)
    wanted = wishes(study, choice.only)
    names = left_out(study)
    check_grown(study, folder)
    for name in names:
        note = f"source {name} is left out: the folder that it lies in is not given (--folder NAME=PATH)"
        console.print(f"[yellow]warning:[/] {escape(note)}", soft_wrap=True)
    with told_bar() as tell:
        data = prepare_data(study, folder, tell, lambda: bool(stopped))
        points = plan(study, data, wanted, tell)
    ordered = in_order(points)
    mine = shared(ordered if flops is None else within(ordered, flops), choice.share)
    work = Assignment(
        folder=folder.path,
        unseen=data.unseen,
        keep=study.keep_checkpoints,
        began=began,
        deadline=None if seconds is None else began + seconds,
        points=[(each.point, each.recipe) for each in mine],
    )
    return Begun(work, mine, len(points) - len(mine) if flops is not None else 0)


def declare(begun: Begun, study: Study, source: Path) -> None:
    """Keep the declaration, and write every point's settings.

    Args:
        begun: what it came to.
        study: as declared.
        source: its file.
    """
    folder = StudyFolder(begun.work.folder)
    remember(study, source, folder)
    for each in begun.points:
        _settle(folder, each)


def go_on(begun: Begun, workers: int, stopped: Sequence[int], console: Console) -> Standing:
    """Train what is left of the points."""
    now = standing(begun.work)
    flops = sum(each.point.target_flops for each in begun.points)
    console.print(
        escape(
            f"{len(begun.points)} points of {flops:.3g} model FLOPs in {begun.work.folder}, {now.finished} "
            f"of them finished; {workers} worker(s), about {duration(now.seconds(workers))}"
        ),
        soft_wrap=True,
    )
    return run_points(begun.work, workers, stopped, console)


def conclude(begun: Begun, end: Standing, console: Console, *, stopped: bool) -> int:
    """Say what came of it and what is next; the exit code."""
    folder, total = begun.work.folder, len(begun.points)
    for point, reason in failures(begun.work):
        console.print(f"[yellow]warning:[/] {escape(f'{point.name}: {reason}')}", soft_wrap=True)
    console.print(escape(f"{end.finished} of {total} points are finished"), soft_wrap=True)
    if begun.beyond:
        console.print(f"{begun.beyond} more are beyond the budget, or another machine's share")
    left = total - end.finished - end.failed
    if left:
        why = "stopped as asked" if stopped else "the time is spent"
        console.print(f"{why}, all is saved: the same command continues", soft_wrap=True)
    console.print(escape(f"results in {folder}: points/NAME/result.json and curve.csv"), soft_wrap=True)
    return STOPPED if stopped and left else PARTLY if left or end.failed else 0


def print_points(begun: Begun, console: Console) -> None:
    """The points in their order, with what they take."""
    usual = Speed([])
    heads = ("parameters", "structures", "steps", "rate", "FLOPs", "s")
    lines = [[*heads, "point", "experiments"]]
    total = seconds = 0.0
    for each in begun.points:
        point = each.point
        takes = point.steps * usual.step_seconds(each.step_flops, point.layers)
        total, seconds = total + point.target_flops, seconds + takes
        numbers = (f"{point.parameters:,}", f"{point.train_structures:,}", f"{point.steps:,}")
        held = " (held out)" if point.holdout else ""
        lines.append(
            [*numbers, f"{point.learning_rate:.4g}", f"{point.target_flops:.2e}", f"{takes:.0f}", point.name,
             ", ".join(point.group) + held]
        )  # fmt: skip
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    for line in lines:
        numbers_there = "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=False))
        console.print(escape(f"{numbers_there}  {line[-2]}  {line[-1]}"), soft_wrap=True)
    console.print(
        f"{len(begun.points)} points, {total:.3g} model FLOPs of training, {duration(seconds)} of a core "
        "that nothing else is done on",
        soft_wrap=True,
    )


def _settle(folder: StudyFolder, each: Planned) -> None:
    """Write a point's settings, also into a finished one's: its experiments may be more than they were."""
    place, now = folder.point(each.point.name), each.point.to_json()
    place.path.mkdir(parents=True, exist_ok=True)
    if read_json(place.settings) != now:
        write_json(place.settings, now)
    result = read_json(place.result)
    if result is not None and result["point"] != now:
        write_json(place.result, result | {"point": now})
