"""What commands share that take long: a bar on the terminal, and signals that stop them at a good moment."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM are noted instead of obeyed; a second one ends the process at once."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with the time that is left, on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def told_bar() -> Iterator[Callable[[str, float], None]]:
    """The same; what it yields is told what is being done, and which share of everything is done."""
    with progress_bar() as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=escape(what), completed=share)
