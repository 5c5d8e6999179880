"""What Slurm tells a task of `srun`, as the variables by which ranks find each other. Knows no torch.

Slurm sets the variables of a step (``SLURM_STEP_…``) for what `srun` starts, not for a batch script itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

from equipot.train.errors import TrainError

_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that systems give away by themselves
_INTERACTIVE_STEP = 0xFFFF_FF00
"""Steps from here on are Slurm's own, such as the shell of an interactive allocation."""


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of `srun`.

    Empty where there is nothing to say: not a task of `srun`, alone, or a rank of some launcher already.
    MASTER_ADDR and MASTER_PORT that are set stay as they are.

    Raises:
        TrainError: Slurm's variables cannot be understood.
    """
    given = environment.get
    tasks = int(given("SLURM_STEP_NUM_TASKS") or 0)
    step = int(given("SLURM_STEP_ID") or _INTERACTIVE_STEP)
    if "RANK" in environment or tasks < 2 or step >= _INTERACTIVE_STEP:
        return {}
    try:
        hosts = expand_hosts(given("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        job = int(environment["SLURM_JOB_ID"])
        found = {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(per_node[int(environment["SLURM_NODEID"])]),
        }
    except (LookupError, ValueError) as error:
        raise TrainError(
            f"started by srun, but Slurm's variables are incomplete: {error}; start it with torchrun instead"
        ) from None
    return found | {
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": given("MASTER_ADDR") or hosts[0],
        # the same for all tasks of a step, and seldom that of another job on the same node
        "MASTER_PORT": given("MASTER_PORT") or str(_FIRST_PORT + (7 * job + step) % _PORTS),
    }


def expand_hosts(text: str) -> list[str]:
    """The hosts of a list such as ``gpu[001-003,7],login1`` or ``rack[1-2]node[1-2]``, in Slurm's order.

    Raises:
        ValueError: brackets or ranges are not as Slurm writes them.
    """
    return [host for part in _outside_brackets(text) for host in _expand(part)]


def expand_counts(text: str) -> list[int]:
    """Tasks of each node from a list such as ``2(x3),1``.

    Raises:
        ValueError: not such a list.
    """
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ValueError(f"{text!r} is no list of tasks per node")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _outside_brackets(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for at, letter in enumerate(text):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth not in (0, 1):
            raise ValueError(f"{text!r} is no list of hosts: brackets do not match")
        if letter == "," and not depth:
            yield text[start:at]
            start = at + 1
    if depth or not text[start:]:
        raise ValueError(f"{text!r} is no list of hosts")
    yield text[start:]


def _expand(name: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", name)  # text and ranges in turns
    choices = [_range(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _range(text: str) -> list[str]:
    numbers = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"[{text}] is no range of hosts")
        width = len(found[1])
        numbers += [f"{k:0{width}d}" for k in range(int(found[1]), int(found[2] or found[1]) + 1)]
    return numbers
