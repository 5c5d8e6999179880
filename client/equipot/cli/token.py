"""`equipot token`: a new bearer token, shown once, of which the server keeps no more than a digest."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import Annotated

import typer

from equipot.client.errors import ClientError

BYTES = 32
"""Of randomness: nobody guesses 256 bits."""

_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@/+-]{0,127}")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def token(
    identity: Annotated[str, typer.Argument(help="whose it is: in logs, limits and fair shares")],
    tokens: Annotated[
        Path | None, typer.Option(help="the server's file of tokens, to which its line is added")
    ] = None,
) -> None:
    """Print a new bearer token; its line for the server's file of tokens goes to --tokens, or to stderr.

    The file is read by `equipot serve --tokens FILE`, and again whenever it changes. To withdraw a token,
    delete its line. An identity may have several tokens.
    """
    if not _IDENTITY.fullmatch(identity):
        raise ClientError(
            f"{identity!r} is no identity: allowed are letters, digits and ._@/+-, the first one a letter or"
            " digit, 128 at most"
        )
    made = secrets.token_urlsafe(BYTES)
    line = f"{identity}: sha256:{hashlib.sha256(made.encode()).hexdigest()}"
    if tokens is None:
        typer.echo(line, err=True)
    else:
        _add(tokens, line)
    typer.echo(made)


def _add(path: Path, line: str) -> None:
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if not text or text.endswith("\n") else "\n") + line + "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ClientError(f"cannot add to {path}: {getattr(error, 'strerror', None) or error}") from error
