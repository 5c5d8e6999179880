"""Long columns of values that need not be in memory. Knows not what the values are."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Column(Protocol):
    """Values by row, such as an array in memory, a mapped one, or one that is computed when asked for."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.integer]:
        """The values of these rows."""
        ...
