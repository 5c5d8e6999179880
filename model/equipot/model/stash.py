"""What one step of a backward pass leaves for a later step of the same pass. Knows nothing of what it is."""

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

REMEDY = "build the model with messages = 'split', which autograd differentiates without limits"


@dataclass(eq=False)
class Stash(Generic[T]):
    """Entries of one backward pass at a time."""

    backward_pass: int = -1
    entries: list[T] = field(default_factory=list)

    def put(self, entry: T) -> None:
        """Leaves an entry.

        Raises:
            RuntimeError: there are some of a pass that ended before it took them.
        """
        self._check()
        self.backward_pass = torch._C._current_graph_task_id()
        self.entries.append(entry)

    def take(self) -> list[T]:
        """All entries of this pass, which are gone then; raises as `put` does."""
        self._check()
        entries, self.entries = self.entries, []
        return entries

    def _check(self) -> None:
        if self.entries and self.backward_pass != torch._C._current_graph_task_id():
            raise RuntimeError(
                "messages: an earlier backward pass through forces ended before it reached the messages "
                "they came from (it failed, or was restricted to some inputs); its share would be added to "
                f"this one: {REMEDY}"
            )


def is_wanted(needed: bool, edge: tuple[Any, int]) -> bool:
    """Whether the running backward pass wants a gradient; `needed` alone says that some pass might."""
    if not needed:
        return False
    try:
        return torch._C._will_engine_execute_node(edge[0])
    except RuntimeError:
        # Torch refuses the question for a leaf that autograd.grad was asked for by name.
        return True
