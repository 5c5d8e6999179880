"""What comes to the page's port and is no browser."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

from tests.serve.conftest import Bundles, running
from tests.serve.test_page import MARK, ask


def test_who_speaks_no_http_leaves_no_traceback(bundles: Bundles, tmp_path: Path) -> None:
    with running(bundles.tiny, "--threads", 1, stderr=tmp_path / "log") as process:
        place = urlsplit(process.page)
        head = f"GET /ui/ HTTP/1.1\r\nHost: {place.netloc}\r\n"
        for rest in ("Host: another\r\n", "Content-Length: -5\r\n", f"X: {'a' * 10_000}\r\n"):
            with socket.create_connection((place.hostname, place.port), timeout=20) as stranger:
                stranger.sendall(f"{head}{rest}\r\n".encode())
                assert stranger.recv(100).startswith(b"HTTP/1.0 400")
        packed = ask(f"{process.page}api/predict", b"{}", {**MARK, "Content-Encoding": "gzip"})
        assert packed.status == 400
        assert ask(process.page).status == 200
        assert "Traceback" not in (tmp_path / "log").read_text()
