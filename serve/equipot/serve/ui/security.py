"""What browsers are told and asked, so that no other site uses the page and no file writes into it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from equipot.serve.config import is_loopback

MARK = "X-Equipot-Page"
"""A header that only the page's own script can send: other sites would have to ask first, and are refused."""

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
)


def objection(headers: Mapping[str, str], *, only_here: bool) -> str | None:
    """Why a request to the page's API is not answered; None if it is the page's own.

    Args:
        headers: of the request.
        only_here: whether the server listens to this machine alone. Then it has no other name: a site whose
            name was turned to this machine's address is found out by the name.
    """
    host = headers.get("Host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if only_here and not is_loopback(name):
        return f"the page is open to this machine alone, and was asked for as {host[:100]!r}"
    if MARK not in headers:
        return f"the header {MARK} is missing: this is for the page at /ui"
    origin = headers.get("Origin")
    if origin is not None and _site(origin) != host:
        return "the request comes from another site"
    return None


def _site(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
