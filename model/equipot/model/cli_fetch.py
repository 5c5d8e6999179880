"""`equipot fetch`: words on the command line to a bundle in a folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from equipot.model.errors import BundleError
from equipot.model.fetching import fetch as fetch_bundle

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fetch(
    url: Annotated[
        str, typer.Argument(help="of an archive, a bundle's folder, or oci://REGISTRY/REPOSITORY:TAG")
    ],
    out: Annotated[Path, typer.Option(help="folder that takes the bundle's folder")],
    sha256: Annotated[str, typer.Option(help="of the archive, or the bundle's digest")],
    name: Annotated[str, typer.Option(help="of the bundle's folder in OUT")] = "bundle",
    token_file: Annotated[Path | None, typer.Option(help="file with a bearer token")] = None,
) -> None:
    """Fetch a bundle, check it, and name it once it is whole; nothing is done if it is there already.

    http(s), file and oci are built in, and s3, gs, abfs, hf, … are fsspec's: install s3fs, gcsfs, adlfs or
    huggingface_hub beside equipot.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    token = ""
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except OSError as error:
            raise BundleError(f"cannot read {token_file}: {error.strerror}") from error
    typer.echo(fetch_bundle(url, out=out, name=name, sha256=sha256, token=token))
