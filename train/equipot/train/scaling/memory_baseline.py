"""The paper's memory experiment by prediction: widths, as they are, with checkpointing, and with ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from equipot.train.memory.plan import apply
from equipot.train.memory.planning import measure_machine, opened
from equipot.train.memory.predict import predict
from equipot.train.memory.profile import paper_runs
from equipot.train.recipe import Recipe


def memory_baseline(
    recipe: Recipe, widths: Sequence[int], ranks: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Predict peak memory and time of a step for each width and setting.

    Args:
        recipe: whose width is replaced.
        widths: to predict.
        ranks: processes.
        say: told what is being done.

    Returns:
        ``runs``, each with setting, width, ranks, bytes of all ranks, seconds a step, the parts of a rank's
        peak, and memory (without what processes and libraries take) and time relative to the plain form of
        that width as it is.

    Raises:
        TrainError: the data cannot be used, or the machine cannot be measured.
    """
    runs: list[dict[str, Any]] = []
    with opened(recipe) as (_, data):
        machine = measure_machine(recipe, ranks, say)
        for width in widths:
            plain: tuple[float, float] | None = None
            for name, each, size in paper_runs(apply(recipe, [("model.width", width)]), ranks, plain=True):
                say(f"width {width}, {name}")
                found = predict(each, data.card_for(each), size, data.workload(each, size), machine)
                own = float(sum(found.parts.values()))
                plain = plain or (own, found.seconds)
                runs.append(
                    {
                        "setting": name,
                        "width": width,
                        "ranks": size,
                        "bytes": found.per_rank * size,
                        "seconds": found.seconds,
                        "relative_memory": own / plain[0],
                        "relative_time": found.seconds / plain[1],
                        "parts_of_a_rank": dict(found.parts) | {"process": found.process},
                    }
                )
    return {"runs": runs}
