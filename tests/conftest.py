"""What tests of several parts share."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, and so would all that tests start be.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("client-only")
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    python = home / "venv" / "bin" / "python"
    command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run(
        [*command, "-c", ROOT / "constraints.txt", ROOT],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=home,
    )
    if installed.returncode and "No matching distribution" in installed.stderr + installed.stdout:
        pytest.skip("no package index can be reached from here")
    assert installed.returncode == 0, installed.stderr
    return python
