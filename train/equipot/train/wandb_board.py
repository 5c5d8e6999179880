"""W&B's one room: a run's numbers for Weights & Biases, in files of the run or sent away."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Literal

import wandb

from equipot.train.recipe import Recipe
from equipot.train.run_directory import RunDirectory


class WandbBoard:
    """One W&B run per run directory; continued runs are one to W&B, too.

    Offline, everything lies under ``wandb/`` in the run, for ``wandb sync``, and no network is used.

    Args:
        recipe: shown as the run's configuration.
        run: where the files go.
        mode: offline, or online, which asks for credentials as `wandb login` left them.

    Raises:
        OSError: W&B cannot be reached, or refuses.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, mode: Literal["offline", "online"]) -> None:
        name = run.path / "wandb" / "id"
        name.parent.mkdir(parents=True, exist_ok=True)
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=recipe.watch.wandb_project,
                dir=run.path,
                id=name.read_text(),
                name=run.path.name,
                resume="allow",
                mode=mode,
                config=recipe.model_dump(mode="json"),
                # what the terminal shows, git and code are none of its business
                settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
            )
        except wandb.Error as error:
            raise OSError(f"W&B: {error}") from error
        # W&B's own count of steps cannot go back, as ours does when a run is continued from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers."""
        self._run.log({"step": step, **values})

    def flush(self) -> None:
        """W&B's own process writes as it goes."""

    def close(self) -> None:
        """End the W&B run; the next start continues it."""
        self._run.finish()
