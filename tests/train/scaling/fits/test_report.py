"""The report: one page that needs nothing else, its figures, and the commands that make it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from equipot.train.scaling.cli import app
from equipot.train.scaling.fit import fit_study
from equipot.train.scaling.report import write_report
from equipot.train.scaling.rows import ResultError, read_study

from .synthetic import Synthetic


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of each experiment, at fewer sizes; a name that HTML would trip over."""
    path = tmp_path_factory.mktemp("report") / "a<b> & c"
    made = Synthetic(path)
    for seed in range(2):
        for width in (8, 16, 32, 64, 128):
            made.point("size", width, steps=1000, seed=seed)
        for fraction in (0.08, 0.16, 0.32, 0.64):
            made.point("data", 64, steps=1000, seed=seed, data_fraction=fraction)
        for layers, width in ((2, 78), (6, 45), (12, 32)):
            made.point("depth", width, steps=1000, seed=seed, layers=layers)
        made.point("confounds", 64, steps=1000, seed=seed, forces="direct")
        made.point("architectures", 64, steps=1000, seed=seed, architecture="gcn")
    return path


def test_the_page_is_whole_alone_and_says_what_is_not_there(small: Path) -> None:
    part = {"setting": "plain: as it is", "width": 64, "ranks": 2, "bytes": 10**9, "seconds": 1.0}
    runs = [part | {"relative_memory": 1.0, "relative_time": 1.0}]
    runs.append(part | {"setting": "fast: as it is", "relative_memory": 0.25, "relative_time": 0.4})
    (small / "memory.json").write_text(json.dumps({"runs": runs}))
    done = CliRunner().invoke(app, ["report", str(small), "--replicates", "50"], catch_exceptions=False)
    assert done.exit_code == 0
    text = (small / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.sources
    assert all(each.startswith(("data:image/png;base64,", "#part")) for each in page.sources)
    assert not re.search(r"https?://|<script", text)
    assert page.open == ["html", "body"] or page.open == []
    assert "a&lt;b&gt; &amp; c" in text
    pictures = {path.stem for path in (small / "figures").glob("*.png")}
    assert {"loss-vs-parameters", "loss-vs-data", "loss-vs-compute", "width-vs-depth"} <= pictures
    assert {"confounds", "architectures", "parity", "elements"} <= pictures
    assert "direct forces (same width, depth, data, steps and seed): test loss" in text
    assert "at no more than the paper&#x27;s: won back by fast: as it is" in text
    assert "Not measured: give" in text
    fits = json.loads((small / "fits.json").read_text())
    assert (
        fits["laws"][0]["parameters"]["exponent"]["low"] < fits["laws"][0]["parameters"]["exponent"]["high"]
    )
    assert (small / "results.csv").exists()


def test_a_study_just_begun_has_a_report(tmp_path: Path) -> None:
    Synthetic(tmp_path / "begun").point("size", 8, steps=10)
    results = read_study(tmp_path / "begun")
    written = write_report(results, fit_study(results, replicates=50), "today")
    text = written.page.read_text()
    assert "There is nothing to show of it yet" in text
    assert "needs at least 4" in text


def test_fit_prints_laws_and_the_best_use_of_a_budget(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    made = Synthetic(small.parent / "budgets")
    for width in (8, 16, 32, 64):
        for steps in (100, 400, 1600):
            made.point("size", width, steps=steps)
    options = ["--budget", "1e11", "--replicates", "50"]
    done = CliRunner().invoke(app, ["fit", str(made.path), *options], catch_exceptions=False)
    assert "Best use of a budget" in done.output
    assert "are best spent on width" in done.output
    assert "egnn: loss in parameters" in done.output
    assert "fits.json" in done.output
    with pytest.raises(ResultError, match="--budget"):
        CliRunner().invoke(app, ["fit", str(made.path), "--budget", "-1"], catch_exceptions=False)
