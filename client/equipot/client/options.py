"""Words on the command line that several verbs share: whom to trust, and who asks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from equipot.client.batches import Priority
from equipot.client.certainty import Uncertainty
from equipot.client.credentials import Credentials, Tls
from equipot.client.errors import ClientError
from equipot.client.retry import RetryPolicy
from equipot.client.sync import Client

UseTls = Annotated[bool, typer.Option("--tls", help="encrypt, and trust servers of the public authorities")]
TlsCa = Annotated[Path | None, typer.Option(help="authorities to trust, as PEM; this turns TLS on")]
TlsCert = Annotated[Path | None, typer.Option(help="our certificate, if the server wants one")]
TlsKey = Annotated[Path | None, typer.Option(help="the key of our certificate")]
TlsName = Annotated[str, typer.Option(help="name in the server's certificate, if not the address")]
TokenFile = Annotated[
    Path | None, typer.Option(help="file with our bearer token; default: the token that EQUIPOT_TOKEN holds")
]
AllowPlaintextToken = Annotated[
    bool, typer.Option("--allow-plaintext-token", help="show the token without TLS on other machines, too")
]


TOKEN_VARIABLE = "EQUIPOT_TOKEN"
"""Of the environment: on the command line a token could be read by everybody on the machine."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A client's arguments of trust, as the command line and the environment give them."""

    tls: Tls | None
    token: str
    token_file: Path | None
    allow_plaintext_token: bool

    def credentials(self) -> Credentials:
        """The same as a client keeps them."""
        return Credentials(
            tls=self.tls,
            token=self.token,
            token_file=self.token_file,
            allow_plaintext_token=self.allow_plaintext_token,
        )

    def client(
        self,
        address: str,
        *,
        timeout: float,
        model: str = "",
        retry: RetryPolicy | None = None,
        priority: Priority = "normal",
    ) -> Client:
        """A client that shows them."""
        return Client(
            address,
            model=model,
            timeout=timeout,
            retry=retry,
            tls=self.tls,
            token=self.token,
            token_file=self.token_file,
            allow_plaintext_token=self.allow_plaintext_token,
            priority=priority,
        )


TellUncertainty = Annotated[
    bool,
    typer.Option(
        "--uncertainty",
        help="write spreads, intervals and what is outside the training domain beside the results",
    ),
]
Coverage = Annotated[
    float, typer.Option(min=0.01, max=0.99, help="how often the intervals are to hold the truth")
]
RefuseOutside = Annotated[
    bool,
    typer.Option("--refuse-outside", help="a structure outside the training domain fails there"),
]


def certainty_wanted(*, uncertainty: bool, coverage: float, refuse_outside: bool) -> bool | Uncertainty:
    """These words as the client takes them."""
    if not (uncertainty or refuse_outside):
        return False
    return Uncertainty(coverage=coverage, refuse_outside=refuse_outside)


def as_words(how: Mapping[str, object], model: str, level_of_theory: str, sure: bool | Uncertainty) -> str:
    """What decides the results, as it is given on the command line."""
    words = [f"--{name.replace('_', '-')} {value}" for name, value in how.items() if value is not None]
    words += [f"--model {model}"] if model else []
    words += [f"--level-of-theory {level_of_theory}"] if level_of_theory else []
    if isinstance(sure, Uncertainty):
        words.append(f"--uncertainty --coverage {sure.coverage:g}")
        words += ["--refuse-outside"] if sure.refuse_outside else []
    return " ".join(words)


def shown(
    *,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str,
    token_file: Path | None,
    allow_plaintext_token: bool,
) -> Shown:
    """Puts the words together.

    Raises:
        ClientError: they do not fit together, or a file cannot be used.
    """
    wanted = tls or tls_ca is not None
    if not wanted and (tls_cert is not None or tls_key is not None or tls_name):
        raise ClientError(
            "--tls-cert, --tls-key and --tls-name need --tls-ca, or --tls for public authorities"
        )
    return Shown(
        Tls(ca=tls_ca, cert=tls_cert, key=tls_key, name=tls_name) if wanted else None,
        # A file was named now and here; the environment speaks for all commands.
        "" if token_file is not None else os.environ.get(TOKEN_VARIABLE, "").strip(),
        token_file,
        allow_plaintext_token,
    )
