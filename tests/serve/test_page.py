"""The page's API: real files to a real server over HTTP, and what it does not let in."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import ase.io
import numpy as np
import pytest
from ase import Atoms
from tests.serve.conftest import Bundles, Process, crystal, molecule, run, running

from equipot.client import Client
from equipot.serve.config import ServeConfig
from equipot.serve.errors import ServeError
from equipot.serve.http_side import HttpSide
from equipot.serve.metrics import Metrics
from equipot.serve.recent import Recent
from equipot.serve.ui import motion
from equipot.serve.ui.page import STATIC

MARK = {"X-Equipot-Page": "1"}


@dataclass
class Reply:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=pytest.fail)

    @property
    def error(self) -> str:
        message = self.json["error"]["message"]
        assert isinstance(message, str)
        return message


def ask(url: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None) -> Reply:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, MARK if headers is None else headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Reply(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.headers, error.read())


def read(server: Process, name: str, text: str | bytes) -> Reply:
    data = text.encode() if isinstance(text, str) else text
    return ask(f"{server.page}api/read?name={quote(name)}", data)


def written(atoms: Atoms | list[Atoms], kind: str) -> str:
    stream = io.BytesIO() if kind == "cif" else io.StringIO()
    ase.io.write(stream, atoms, format=kind)
    value = stream.getvalue()
    return value.decode() if isinstance(value, bytes) else value


def atoms_of(seed: int, *, periodic: bool = False) -> Atoms:
    system = crystal(seed) if periodic else molecule(seed)
    return Atoms(system.atomic_numbers, system.positions, cell=system.cell, pbc=system.pbc)


def relax_lines(server: Process, frame: dict[str, Any], **words: Any) -> list[dict[str, Any]]:
    reply = ask(f"{server.page}api/relax", {"model": "tiny", "structures": [frame], **words})
    assert reply.status == 200, reply.body
    return [json.loads(line, parse_constant=pytest.fail) for line in reply.body.splitlines()]


class TestReading:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("a.xyz", "extxyz"),
            ("a.EXTXYZ", "extxyz"),
            ("", "extxyz"),
            ("a.cif", "cif"),
            ("", "cif"),
            ("POSCAR", "vasp"),
            ("POSCAR.slab", "vasp"),
            ("", "vasp"),
            ("a.pdb", "proteindatabank"),
            ("a.xsf", "xsf"),
        ],
    )
    def test_formats(self, server: Process, name: str, kind: str) -> None:
        atoms = atoms_of(1, periodic=True)
        atoms = atoms[np.argsort(atoms.numbers, kind="stable")]
        reply = read(server, name, written(atoms, kind))
        assert reply.status == 200, reply.body
        assert reply.json["format"] == kind
        (frame,) = reply.json["frames"]
        assert frame["atomic_numbers"] == atoms.numbers.tolist()
        again = Atoms(frame["atomic_numbers"], frame["positions"], cell=frame["cell"], pbc=True)
        # Some formats turn the cell, none changes distances.
        np.testing.assert_allclose(
            again.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=2e-3
        )

    def test_every_frame(self, server: Process) -> None:
        frames = [atoms_of(seed) for seed in range(3)]
        frames[1].info["charge"] = -1
        shown = read(server, "run.xyz", written(frames, "extxyz")).json["frames"]
        assert [frame["charge"] for frame in shown] == [0, -1, 0]
        for frame, atoms in zip(shown, frames, strict=True):
            np.testing.assert_allclose(frame["positions"], atoms.positions, atol=1e-7)

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("a.xyz", "2\n\nC 0 0 0\nC nan 0 0\n", ["position of atom 1 in frame 0 of a.xyz is not finite"]),
            ("a.xyz", "1\n\nC 0 0 0\n1\n\nXq 0 0 0\n", ["frame 1 of a.xyz", "Xq"]),
            ("a.xyz", "1\n\nX 0 0 0\n", ["atom 0 in frame 0 of a.xyz is of no element"]),
            ("a.xyz", "5\n\nC 0 0 0\n", ["frame 0 of a.xyz cannot be read as extxyz"]),
            ("a.cif", "data_x\n_cell_length_a nonsense\n", ["a.cif"]),
            ("POSCAR", "nothing\nof\nthe kind\n", ["frame 0 of POSCAR cannot be read as vasp"]),
            ("a.pdf", "%PDF-1.4 anything", ["a.pdf is of no format", ".cif", "POSCAR"]),
            ("", "hello", ["the text is of no format"]),
            ("a.xyz", "  \n", ["a.xyz is empty"]),
            ("a.xyz", "", ["a.xyz is empty"]),
            ("a.xyz", "1\ncharge=0.9999\nC 0 0 0\n", ["no whole number: '0.9999'"]),
            ("a.traj", b"- of Ulm\xff\xfe", ["a.traj is no text"]),
            ("a.xyz", b"1\n\0\nC 0 0 0\n", ["bytes that no text has"]),
            ("a.xyz", "201\n\n" + "C 0 0 0\n" * 201, ["201 atoms", "200"]),
        ],
    )
    def test_bad_files(self, server: Process, name: str, text: str | bytes, words: list[str]) -> None:
        reply = read(server, name, text)
        assert reply.status in (400, 413)
        for word in words:
            assert word in reply.error
        assert "Traceback" not in reply.body.decode()

    def test_a_pickle_is_not_opened(self, server: Process, tmp_path: Path) -> None:
        trap = tmp_path / "trap"
        text = f"cposix\nsystem\n(S'touch {trap}'\ntR."
        for name in ("a.pckl", "a.gpw", "a.db", "a.json", "a.py", ""):
            assert read(server, name, text).status == 400
        assert not trap.exists()

    def test_too_large(self, server: Process) -> None:
        reply = read(server, "a.xyz", b"x" * (8 * 2**20 + 1))
        assert reply.status == 413
        assert "8388608" in reply.error
        place = urlsplit(server.page)
        with socket.create_connection((place.hostname, place.port), timeout=20) as endless:
            head = f"POST /ui/api/read HTTP/1.1\r\nHost: {place.netloc}\r\nX-Equipot-Page: 1\r\n"
            endless.sendall(f"{head}Content-Length: {10**12}\r\n\r\n".encode())
            assert endless.recv(100).startswith(b"HTTP/1.1 413"), "none of it is waited for"
        many = read(server, "a.xyz", "1\n\nH 0 0 0\n" * 501)
        assert many.status == 413
        assert "500 frames" in many.error


class TestPredicting:
    def test_as_the_client(self, server: Process) -> None:
        atoms = atoms_of(2, periodic=True)
        (frame,) = read(server, "a.xyz", written(atoms, "extxyz")).json["frames"]
        body = {"model": "tiny", "structures": [frame, frame], "stress": True}
        reply = ask(f"{server.page}api/predict", body).json
        sent = Atoms(frame["atomic_numbers"], frame["positions"], cell=frame["cell"], pbc=frame["pbc"])
        with Client(server.address) as client:
            expected = client.predict(sent, model="tiny", stress=True)
        assert expected.model is not None
        assert expected.forces is not None
        assert expected.stress is not None
        assert reply["model"]["digest"] == expected.model.digest
        for result in reply["results"]:
            assert result["energy"] == pytest.approx(float(expected.energy[0]), abs=1e-12)
            np.testing.assert_allclose(result["forces"], expected.forces, atol=1e-12)
            np.testing.assert_allclose(result["stress"], expected.stress[0], atol=1e-12)

    def test_a_bad_structure_fails_alone(self, server: Process) -> None:
        good, gold = (read(server, "a.xyz", f"1\n\n{name} 0 0 0\n").json["frames"][0] for name in ("C", "Au"))
        body = {"model": "tiny", "structures": [gold, good]}
        bad, fine = ask(f"{server.page}api/predict", body).json["results"]
        assert bad["failure"]["field"] == "atomic_numbers"
        assert "Au" in bad["failure"]["message"] or "79" in bad["failure"]["message"]
        assert "energy" in fine

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"structures": []}, "at least one structure"),
            ({"structures": [{}]}, "atomic_numbers"),
            ({"model": "other"}, "other"),
            ({"model": 3}, "model is no text"),
            ({"positions": [[0, 0]]}, "positions"),
            ({"positions": "far"}, "positions is no array"),
            ({"charge": "much"}, "charge"),
            ({"charge": -0.5}, "no whole number"),
        ],
    )
    def test_bad_questions(self, server: Process, change: dict[str, Any], words: str) -> None:
        frame = {"atomic_numbers": [6], "positions": [[0, 0, 0]], "cell": [[0, 0, 0]] * 3, "pbc": [False] * 3}
        body = {"model": "tiny", "structures": [frame]}
        (body if change.keys() & body.keys() else frame).update(change)
        reply = ask(f"{server.page}api/predict", body)
        assert reply.status in (400, 404)
        assert words in reply.error

    def test_no_json(self, server: Process) -> None:
        for body in (b"", b"{", b"[]", b"[" * 100_000):
            reply = ask(f"{server.page}api/predict", body)
            assert reply.status == 400
            assert "no JSON" in reply.error
        packed = ask(f"{server.page}api/predict", b"{}", {**MARK, "Content-Encoding": "gzip"})
        assert packed.status == 400
        assert "packed" in packed.error


class TestRelaxing:
    @pytest.fixture
    def frame(self, server: Process) -> dict[str, Any]:
        (frame,) = read(server, "a.xyz", written(atoms_of(3), "extxyz")).json["frames"]
        assert isinstance(frame, dict)
        return frame

    def test_every_step_is_told(self, server: Process, frame: dict[str, Any]) -> None:
        lines = relax_lines(server, frame, fmax=0.002, max_steps=1000)
        begun, *steps, result = lines
        assert begun["model"]["name"] == "tiny"
        assert [line["step"] for line in steps] == list(range(1, result["steps"] + 1))
        assert result["converged"]
        assert result["positions"] == steps[-1]["positions"]
        assert steps[0]["positions"] != steps[-1]["positions"]
        # What is told of a step belongs together: the forces are those of its positions.
        middle = steps[len(steps) // 2]
        body = {"model": "tiny", "structures": [{**frame, "positions": middle["positions"]}]}
        (alone,) = ask(f"{server.page}api/predict", body).json["results"]
        np.testing.assert_allclose(middle["forces"], alone["forces"], atol=1e-9)
        assert middle["energy"] == pytest.approx(alone["energy"], abs=1e-9)

    def test_a_run_has_as_many_frames_as_can_be_shown(self, frame: dict[str, Any]) -> None:
        asked = motion.simulate_request({"structures": [frame], "steps": 20_000})
        assert asked.frame_every == 20
        assert motion.simulate_request({"structures": [frame], "steps": 1_000}).frame_every == 1
        large = {**frame, "atomic_numbers": [1] * 20_000, "positions": np.zeros((20_000, 3)).tolist()}
        assert motion.simulate_request({"structures": [large], "steps": 1_000}).frame_every == 20

    def test_bad_settings(self, server: Process, frame: dict[str, Any]) -> None:
        for words, told in (
            ({"optimizer": "magic"}, "optimizer is 'magic'"),
            ({"cell": "full"}, "periodic"),
            ({"fmax": -1}, "fmax"),
            ({"fmax": 10**400}, "fmax"),
            ({"model": "\ud800"}, "model is no text"),
            ({"max_steps": 10**9}, "max_steps"),
            ({"integrator": "magic"}, "integrator is 'magic'"),
            ({"timestep": "long"}, "timestep is no time above 0 in fs"),
            ({"temperature": 0}, "temperature is no temperature above 0 in K"),
            ({"steps": 10**6}, "the page runs at most 20000"),
        ):
            body = {"model": "tiny", "structures": [frame], **words}
            moves = words.keys() & {"integrator", "timestep", "temperature", "steps"}
            reply = ask(f"{server.page}api/{'simulate' if moves else 'relax'}", body)
            assert reply.status == 400
            assert told in reply.error

    def test_who_leaves_stops_it(self, server: Process, frame: dict[str, Any]) -> None:
        body = json.dumps({"model": "tiny", "structures": [frame], "fmax": 1e-12, "max_steps": 100_000})
        place = urlsplit(server.page)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
        connection.request("POST", "/ui/api/relax", body, MARK)
        reply = connection.getresponse()
        assert json.loads(reply.readline())["kind"] == "begun"
        assert json.loads(reply.readline())["step"] == 1
        assert server.sample("equipot_moving_structures") == 1
        reply.close()
        connection.close()
        until(lambda: server.sample("equipot_moving_structures") == 0)

    def test_who_does_not_read_holds_up_nobody(self, server: Process, frame: dict[str, Any]) -> None:
        body = json.dumps({"model": "tiny", "structures": [frame], "fmax": 1e-12, "max_steps": 100_000})
        place = urlsplit(server.page)
        with socket.create_connection((place.hostname, place.port), timeout=20) as silent:
            head = f"POST /ui/api/relax HTTP/1.1\r\nHost: {place.netloc}\r\nX-Equipot-Page: 1\r\n"
            silent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: server.sample("equipot_moving_structures") == 1)
            assert relax_lines(server, frame, fmax=0.002, max_steps=1000)[-1]["steps"] > 0
        until(lambda: server.sample("equipot_moving_structures") == 0)

    def test_who_never_reads_is_cut_off_and_a_withdrawn_token_ends_the_lines(
        self, bundles: Bundles, tmp_path: Path, frame: dict[str, Any]
    ) -> None:
        (tokens := tmp_path / "tokens").write_text("ann: ann's-secret-token-1\n")
        words = ("--tokens", tokens, "--session-idle", 0.5, "--log-format", "json")
        body = json.dumps({"model": "tiny", "structures": [frame], "fmax": 1e-12, "max_steps": 100_000})
        headers = {**MARK, "Authorization": "Bearer ann's-secret-token-1"}

        def outcomes() -> list[str]:
            lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
            return [line["outcome"] for line in lines if line.get("message") == "Relax"]

        with running(bundles.tiny, *words, stderr=tmp_path / "log") as server:
            place = urlsplit(server.page)
            with socket.create_connection((place.hostname, place.port), timeout=20) as silent:
                marks = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                head = f"POST /ui/api/relax HTTP/1.1\r\nHost: {place.netloc}\r\n{marks}"
                silent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                until(lambda: outcomes() == ["cancelled"])
                assert server.sample("equipot_calls") == 0
            connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
            connection.request("POST", "/ui/api/relax", body, headers)
            reply = connection.getresponse()
            assert json.loads(reply.readline())["kind"] == "begun"
            tokens.write_text("bob: bob's-secret-token-22\n")
            # Nothing but lines: an answer that has begun has no second head.
            *_, last = [json.loads(line) for line in reply]
            connection.close()
            assert last["kind"] == "error"
            assert last["error"]["reason"] == "UNAUTHENTICATED"
            until(lambda: outcomes() == ["cancelled", "unauthenticated"])


class TestLooking:
    def test_models(self, server: Process) -> None:
        answer = ask(f"{server.page}api/models").json
        tiny, direct = answer["models"]
        assert (tiny["name"], tiny["is_default"], tiny["elements"]) == ("tiny", True, [1, 6, 8])
        assert (direct["levels_of_theory"], direct["has_stress"]) == (["PBE", "B3LYP"], False)
        assert answer["limits"]["atoms"] == 200
        assert tiny["card"]["provenance"] == {"data": "none"}

    def test_pulse(self, server: Process) -> None:
        frame = {"atomic_numbers": [6], "positions": [[0, 0, 0]], "cell": [[0, 0, 0]] * 3, "pbc": [False] * 3}
        ask(f"{server.page}api/predict", {"model": "tiny", "structures": [frame] * 3})
        pulse = ask(f"{server.page}api/pulse").json
        assert pulse["queue"] == {"requests": 0, "atoms": 0, "edges": 0, "seconds": 0.0}
        assert pulse["whole"]["structures"] >= 3
        assert 0 < pulse["whole"]["p50"] <= pulse["whole"]["p99"]

    def test_recent(self) -> None:
        now = 1000.5
        recent = Recent(lambda: now)
        for index in range(100):
            recent.answered(0.001 * (index + 1))
        recent.computed(structures=2, atoms=20, edges=200)
        now = 1003.5
        (span,) = recent.spans()
        assert (span.answers, span.structures, span.atoms, span.edges) == (100, 2, 20, 200)
        assert span.p50 == pytest.approx(0.0505)
        assert span.p99 == pytest.approx(0.09901)
        now = 1012.0
        recent.computed(structures=5, atoms=5, edges=5)
        assert recent.spans()[-1].structures == 0, "the present second is not over"
        now = 1400.0
        recent.computed(structures=1, atoms=1, edges=1)
        assert recent.whole().structures == 1, "what is longer ago is forgotten"

    def test_metrics_beside_it(self, server: Process) -> None:
        assert "equipot_requests_total" in server.scrape()


class TestStrangers:
    def test_headers(self, server: Process) -> None:
        for path in ("", "app.js", "api/elements"):
            headers = ask(server.page + path).headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "Access-Control-Allow-Origin" not in headers

    def test_files_name_no_other_place(self) -> None:
        page = (STATIC / "index.html").read_text()
        assert "<script type" in page
        assert "http" not in page.replace("http-equiv", "")
        assert "style=" not in page
        assert "onclick" not in page

    def test_other_sites_are_refused(self, server: Process) -> None:
        host = urlsplit(server.page).netloc
        for headers in (
            {},
            {**MARK, "Origin": "https://evil.example"},
            {**MARK, "Origin": "null"},
            {**MARK, "Origin": "http://["},
            {**MARK, "Host": "evil.example", "Origin": "http://evil.example"},
        ):
            assert ask(f"{server.page}api/models", headers=headers).status == 403
        assert ask(f"{server.page}api/models", headers={**MARK, "Origin": f"http://{host}"}).status == 200

    def test_no_way_out_of_its_files(self, server: Process) -> None:
        for path in ("../page.py", "%2e%2e/page.py", "static/app.js", "page.py", "api/other"):
            assert ask(server.page + path).status == 404

    def test_off(self) -> None:
        async def look() -> None:
            http = HttpSide(Metrics(), host="127.0.0.1", port=0)
            await http.start()
            root = f"http://127.0.0.1:{http.port}"
            for path in ("/ui", "/ui/", "/ui/api/models", "/"):
                assert (await asyncio.to_thread(ask, root + path)).status == 404
            for accepted in ("*/*", "application/openmetrics-text; version=latest"):
                reply = await asyncio.to_thread(ask, f"{root}/metrics", None, {"Accept": accepted})
                assert b"process_" in reply.body
            await http.stop()

        run(look())

    def test_tokens_and_limits(self, bundles: Bundles, tmp_path: Path) -> None:
        (tmp_path / "tokens").write_text("ann: ann's-secret-token-1\n")
        (tmp_path / "limits.toml").write_text("[identities.ann]\nrequest_atoms = 2\n")
        words = ("--tokens", tmp_path / "tokens", "--identity-limits", tmp_path / "limits.toml")
        with running(bundles.tiny, *words, stderr=tmp_path / "log") as server:
            assert ask(server.page).status == 200, "the page itself must come before it can ask for a token"
            for path in ("models", "pulse"):
                reply = ask(f"{server.page}api/{path}")
                assert reply.status == 401
                assert "bearer token" in reply.error
            wrong = {**MARK, "Authorization": "Bearer not-this-one-either"}
            assert ask(f"{server.page}api/read", b"1\n\nC 0 0 0\n", wrong).status == 401
            no_text = {**MARK, "Authorization": "Bearer \xff"}
            assert ask(f"{server.page}api/models", headers=no_text).status == 401
            right = {**MARK, "Authorization": "Bearer ann's-secret-token-1"}
            assert ask(f"{server.page}api/models", headers=right).json["models"][0]["name"] == "tiny"
            for n_atoms, status in ((2, 200), (3, 413)):
                text = f"{n_atoms}\n\n" + "".join(f"C {2 * index} 0 0\n" for index in range(n_atoms))
                (frame,) = ask(f"{server.page}api/read?name=a.xyz", text.encode(), right).json["frames"]
                for path in ("predict", "relax"):
                    body = {"model": "tiny", "structures": [frame]}
                    assert ask(f"{server.page}api/{path}", body, right).status == status
            log = server.log()
            assert "secret" not in log
            assert "unauthenticated" in log


class TestWhereItIsOffered:
    @pytest.mark.parametrize(
        ("words", "offered"),
        [
            ({}, True),
            ({"ui": False}, False),
            ({"metrics_port": None}, False),
            ({"host": "0.0.0.0"}, False),
            ({"host": "0.0.0.0", "ui": True}, True),
            ({"metrics_host": "0.0.0.0"}, False),
            ({"host": "0.0.0.0", "metrics_host": "127.0.0.1"}, True),
        ],
    )
    def test_by_default_to_this_machine(self, bundles: Bundles, words: dict[str, Any], offered: bool) -> None:
        assert ServeConfig(bundles=(bundles.tiny,), **words).offers_page is offered

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ({"metrics_port": None}, "there is no HTTP port"),
            ({"metrics_host": "0.0.0.0"}, "0.0.0.0 is open to other machines, and the service at 127.0.0.1"),
            (
                {"tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": Path("a")},
                "callers must show certificates",
            ),
        ],
    )
    def test_no_way_round_what_callers_must_show(
        self, bundles: Bundles, words: dict[str, Any], reason: str
    ) -> None:
        assert not ServeConfig(bundles=(bundles.tiny,), **words).offers_page
        with pytest.raises(ServeError, match=reason):
            ServeConfig(bundles=(bundles.tiny,), ui=True, **words)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _nothing_is_left(server: Process) -> Iterator[None]:
    """What a test began has ended when it has."""
    yield
    assert server.popen.poll() is None
