"""The server as a Ray Serve application. The one room for Ray in serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: Mapping[str, object]) -> Application:
    """The application for `serve run equipot.serve.ray_app:build` or a Serve config file.

    Args:
        args: a configuration as `equipot serve --config` reads it, with a table `ray`. Relative paths start
            from the working directory; on a cluster all paths must be where every node finds them.

    Raises:
        ServeError: something is unknown, of the wrong type, or out of range.
    """
    # Only now: Ray Serve reads its environment while it is imported, and `local` sets it before.
    from equipot.serve.ray_app.application import application

    return application(args, base=Path.cwd())
