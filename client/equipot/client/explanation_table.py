"""Shows people what a batch would cost."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from equipot.client.errors import describe
from equipot.client.explanation import Explanation

MOST_FAILURES = 20


def print_explanation(console: Console, explanation: Explanation) -> None:
    """Prints a table of the costs, and a line for each structure that would fail."""
    table = Table(box=None, pad_edge=False, show_header=False)
    computed = len(explanation.n_edges) - len(explanation.failures)
    rows = {
        "structures": f"{computed} of {len(explanation.n_edges)} would be computed",
        "atoms": f"{explanation.total_atoms:,}",
        "edges": f"{explanation.total_edges:,}",
        "requests, batches": f"{explanation.n_requests}, {explanation.n_batches}",
        "memory of a batch": _size(explanation.memory_bytes),
        "preparation": _time(explanation.prepare_seconds),
        "queue": _time(explanation.queue_seconds),
        "engine": _time(explanation.compute_seconds),
        "in all": _time(explanation.seconds),
        "priority": explanation.priority,
    }
    if explanation.model is not None:
        model = explanation.model
        rows["model"] = f"{model.pinned} ({model.level_of_theory}), {model.dtype}, {explanation.replica}"
    if explanation.refusal:
        rows["refused now"] = explanation.refusal
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=True)
    for failure in explanation.failures[:MOST_FAILURES]:
        console.print(describe(failure), soft_wrap=True, highlight=False, markup=False)
    if (more := len(explanation.failures) - MOST_FAILURES) > 0:
        console.print(f"… and {more} more would fail")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB" if n_bytes else "not known"


def _time(seconds: float) -> str:
    if math.isinf(seconds):
        return "not known: nothing like it was computed yet"
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{1000 * seconds:,.1f} ms"
