"""The page in a real browser, before a real server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from tests.serve.chromium import PROGRAM, Tab, browser
from tests.serve.conftest import Process, molecule, running, write_tiny

from equipot.client import Client

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")

HOSTILE = '<img src=x onerror="window.bad=1"><script>window.bad=1</script>'


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """One browser for all tests here."""
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(one: Tab, server: Process) -> Tab:
    """The page, freshly opened."""
    one.go(server.page)
    one.until("document.documentElement.dataset.ready")
    one.troubles.clear()
    return one


def xyz(atoms: Atoms, comment: str = "") -> str:
    rows = [
        f"{symbol} {' '.join(map(str, place))}"
        for symbol, place in zip(atoms.symbols, atoms.positions, strict=True)
    ]
    return "\n".join([str(len(atoms)), comment, *rows]) + "\n"


def some_atoms(seed: int) -> Atoms:
    system = molecule(seed)
    return Atoms(system.atomic_numbers, np.round(system.positions, 6))


def test_a_dropped_file_is_computed_and_drawn(tab: Tab, server: Process) -> None:
    atoms = some_atoms(4)
    tab.drop("mine.xyz", xyz(atoms))
    shown = float(tab.until("document.getElementById('energy')?.dataset.value"))
    with Client(server.address) as client:
        expected = client.predict(atoms, model="tiny")
    assert shown == pytest.approx(float(expected.energy[0]), abs=1e-9)
    drawn = tab.run("({...document.getElementById('viewer').dataset})")
    assert expected.forces is not None
    # Arrows whose length is next to nothing are left out.
    sizes = np.linalg.norm(expected.forces, axis=1)
    assert (int(drawn["atoms"]), int(drawn["arrows"])) == (6, int((2.2 * sizes / sizes.max() >= 0.08).sum()))
    column = [float(tab.text(f"#atoms tbody tr:nth-child({row}) td:last-child")) for row in range(1, 7)]
    np.testing.assert_allclose(column, sizes, atol=6e-4)
    # Something else than the ground is in the picture.
    tab.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = tab.send("Page.captureScreenshot")["data"]
    tab.drop("other.xyz", xyz(some_atoms(5)))
    tab.until(f"document.getElementById('energy')?.dataset.value && {shown} != energy.dataset.value")
    assert tab.send("Page.captureScreenshot")["data"] != picture
    assert not tab.troubles


def test_a_relaxation_plays_to_its_end(tab: Tab, server: Process) -> None:
    atoms = some_atoms(3)
    tab.drop("mine.xyz", xyz(atoms))
    begun = float(tab.until("document.getElementById('energy')?.dataset.value"))
    tab.run("fmax.value = 0.002; document.getElementById('max-steps').value = 1000; go.click()")
    tab.until("document.getElementById('move-status').dataset.state === 'converged'")
    ended = float(tab.run("energy.dataset.value"))
    steps = int(tab.run("document.getElementById('frame').max"))
    assert ended < begun
    assert f"relaxed in {steps} steps" in tab.text("#move-status")
    assert tab.run("document.querySelectorAll('#move-plot svg').length") == 2
    # What can be downloaded is what was shown.
    tab.run(
        "URL.createObjectURL = (blob) => (window.saved = blob, 'blob:x'); HTMLAnchorElement.prototype.click ="
        " () => {}; document.getElementById('download').click()"
    )
    saved = tab.run("window.saved.text()")
    assert saved.count("Properties=") == steps + 1
    assert f"energy={ended}" in saved
    tab.run("const slider = document.getElementById('frame'); slider.value = 0;"
            " slider.dispatchEvent(new Event('input'))")  # fmt: skip
    assert float(tab.run("energy.dataset.value")) == begun
    assert not tab.troubles


def test_dynamics_play_and_stop(tab: Tab, server: Process) -> None:
    atoms = some_atoms(3)
    tab.drop("mine.xyz", xyz(atoms))
    tab.until("document.getElementById('energy')?.dataset.value")
    tab.run("document.querySelector('[value=dynamics]').click()")
    assert tab.text("#go") == "Run"
    tab.run("document.getElementById('md-steps').value = 60; go.click()")
    tab.until("document.getElementById('move-status').dataset.state === 'converged'")
    told = tab.text("#move-status").replace("\xa0", " ")
    assert "60 steps, 30.0 fs; total energy kept within ± " in told
    # What is seen is the run that every client would get.
    with Client(server.address) as client:
        (run,) = client.simulate(
            [atoms],
            model="tiny",
            steps=60,
            timestep=0.5,
            temperature=300,
            integrator="velocity_verlet",
            seed=0,
        )
    totals = [frame.energy + frame.kinetic_energy for frame in run.frames]
    assert float(tab.run("energy.dataset.value")) == pytest.approx(run.frames[-1].energy, abs=1e-6)
    assert float(told.split("± ")[1].split(" meV")[0]) >= 1000 * abs(totals[-1] - totals[0]) / 2 - 0.01
    assert tab.run("document.querySelectorAll('#move-plot svg').length") == 2
    assert "30.0 / 30.0 fs" in tab.text("#frame-now")
    assert "Temperature" in tab.text("#facts")
    # Another run, from there, ends when its button is pressed.
    tab.run("integrator.value = 'langevin'; document.getElementById('md-steps').value = 20000; go.click()")
    tab.until("document.getElementById('move-status').innerText.startsWith('step ')")
    tab.click("#go")
    tab.until("document.getElementById('move-status').dataset.state === 'stopped'")
    assert tab.text("#go") == "Run"
    # What the server refuses is told where it is seen.
    tab.run("document.getElementById('timestep').value = -1; go.click()")
    tab.until("!document.getElementById('alert').hidden")
    assert "Timestep is no time above 0 in fs." in tab.text("#alert")
    assert server.sample("equipot_requests_total", outcome="internal") == 0


def test_frames_have_a_slider(tab: Tab) -> None:
    tab.drop("run.xyz", "".join(xyz(some_atoms(seed)) for seed in (1, 2, 3)))
    first = tab.until("document.getElementById('energy')?.dataset.value")
    assert tab.run("document.getElementById('frame').max") == "2"
    tab.run("document.getElementById('frame').value = 2;"
            " document.getElementById('frame').dispatchEvent(new Event('input'))")  # fmt: skip
    assert tab.run("energy.dataset.value") != first
    assert tab.run("document.querySelectorAll('#frames-plot svg').length") == 2


def test_what_a_file_says_stays_text(tab: Tab) -> None:
    tab.drop(f"{HOSTILE}.xyz", xyz(some_atoms(1), f"name='{HOSTILE}' charge=0"))
    tab.until("document.getElementById('energy')?.dataset.value")
    assert "<img" in tab.text("#title")
    tab.drop("bad.xyz", f"1\n\n{HOSTILE} 0 0 0\n")
    tab.until("!document.getElementById('alert').hidden")
    assert "bad.xyz" in tab.text("#alert")
    assert tab.run("document.querySelectorAll('main img, main script, #alert img').length") == 0
    assert tab.run("window.bad") is None


def test_errors_are_told(tab: Tab) -> None:
    tab.drop("gold.xyz", "1\n\nAu 0 0 0\n")
    tab.until("!document.getElementById('failure').hidden")
    assert "Au" in tab.text("#failure")
    assert tab.run("document.getElementById('energy')") is None
    tab.drop("nan.xyz", "1\n\nH nan 0 0\n")
    tab.until("!document.getElementById('alert').hidden")
    assert "atom 0 in frame 0 of nan.xyz is not finite" in tab.text("#alert")


def test_models_and_server(tab: Tab) -> None:
    tab.click("#tab-models")
    cards = tab.text("#models")
    for word in ("tiny", "direct", "B3LYP", "sha256:"):
        assert word in cards
    tab.click("#tab-server")
    tab.until("tiles.innerText.includes('structures/s')")
    assert tab.run("document.querySelectorAll('#view-server svg').length") == 2
    # Nothing sticks out to the side of a phone.
    tab.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    for name in ("structure", "models", "server"):
        tab.click(f"#tab-{name}")
        assert tab.run("document.documentElement.scrollWidth") <= 360
    tab.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.slow
def test_a_token_is_asked_for_and_an_ensemble_says_how_sure_it_is(one: Tab, tmp_path: Path) -> None:
    three = write_tiny(tmp_path / "three", "three", more_seeds=(8, 9), uncertain=True)
    (tmp_path / "tokens").write_text("ann: ann's-secret-token-1\n")
    with running(three, "--tokens", tmp_path / "tokens", stderr=tmp_path / "log") as server:
        one.go(server.page)
        for token in ("wrong-wrong-wrong", "ann's-secret-token-1"):
            one.until("document.getElementById('token-dialog').open")
            one.run(f'token.value = "{token}"; document.getElementById("token-ok").click()')
        one.until("document.documentElement.dataset.ready")
        one.drop("mine.xyz", xyz(some_atoms(1)))
        one.until("document.getElementById('energy')?.dataset.value")
        assert "Spread of 3 members" in one.text("#facts")
        assert one.text("#atoms tbody tr td:last-child").count("±") == 1
        assert one.run("document.getElementById('outside').hidden")
        one.drop("odd.xyz", "2\n\nC 0 0 0\nO 0.5 0 0\n")
        one.until("!document.getElementById('outside').hidden")
        assert "Outside what the model was trained on" in one.text("#outside")
        one.click("#outside button")
        assert one.run("document.querySelectorAll('#atoms tr.selected').length") == 1
        assert one.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_the_page_is_what_its_sources_build(tmp_path: Path) -> None:
    sources = Path(__file__).parents[2] / "serve" / "ui"
    if not (sources / "node_modules").is_dir():
        pytest.skip("serve/ui/node_modules is not there: make ui")
    subprocess.run(["node", "build.js", str(tmp_path)], cwd=sources, check=True, timeout=120)
    static = sources.parent / "equipot" / "serve" / "ui" / "static"
    built = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert built == {path.name: path.read_bytes() for path in static.iterdir()}
