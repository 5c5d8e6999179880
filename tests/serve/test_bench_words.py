"""Words of `equipot bench serve` that cannot be: refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipot.cli.main import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seconds", "0"), "'--seconds'"),
        (("--seconds", "nan"), "'--seconds'"),
        (("--structures", "0"), "'--structures'"),
        (("--deadline", "-1"), "'--deadline'"),
        (("--mutated", "-1"), "'--mutated'"),
        (("--loads", "nan"), "give positive numbers"),
        (("--out", "nowhere/report.json"), "give a file in a folder that is there"),
        (("--out", "."), "give a file in a folder that is there"),
        (("--plot", "nowhere/load.png"), "give a file in a folder that is there"),
        (("--plot", "load.foo"), "ends in .png"),
    ],
)
def test_they_are_refused_at_once(
    words: tuple[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    async def measure(*_: object) -> object:
        pytest.fail("something was measured")

    monkeypatch.setattr("equipot.serve.bench.run.run", measure)
    assert main(["bench", "serve", "bundle", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
