"""Files that many write to, of which a bounded number is open. Knows nothing of what is in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

MOST_OPEN = 100
"""A process may open some 1,000 files, unless somebody has allowed it more."""


class OpenFiles:
    """Keeps those open that were written to last; the others are opened again when they are needed."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __enter__(self) -> Self:
        """None is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes all."""
        while self._open:
            self._open.popitem()[1].close()

    def of(self, owner: object, reopen: Callable[[], Any]) -> Any:  # noqa: ANN401  # whatever it opens
        """The owner's file, opened by `reopen`, behind what it has already, if it is not open."""
        file = self._open.pop(id(owner), None)
        if file is None:
            if len(self._open) >= self._most:
                self._open.popitem(last=False)[1].close()
            file = reopen()
        self._open[id(owner)] = file
        return file
