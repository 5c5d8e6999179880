"""What each rank runs in tests of two ranks: `equipot train` again and again, with changes to a recipe."""

from __future__ import annotations

import json
import sys

from equipot.cli.main import main


def run(recipe: str, jobs: list[tuple[str, list[str]]]) -> int:
    """Train every job, named by its run directory, or continue it there; the worst exit code."""
    codes = []
    for out, changes in jobs:
        overrides = [word for change in changes for word in ("--set", change)]
        codes.append(main(["train", recipe, "--out", out, "--resume", *overrides]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], json.loads(sys.argv[2])))
