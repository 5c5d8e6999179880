"""A server's configuration as a file, as flags, and as both."""

from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from equipot.serve import cli, server
from equipot.serve.config import ServeConfig, default_budget
from equipot.serve.errors import ServeError
from equipot.wire.v1.potential_pb2_grpc import PotentialServiceStub

from .conftest import Bundles, ask, molecule, read, running

FILE = """
bundles = ["models/water"]
port = 6000
metrics_port = false
dtype = "float64"
tls_cert = "/etc/cert.pem"
tls_key = "key.pem"
drain_seconds = 5

[budget]
queue_edges = 1000

[limits]
structure_atoms = 77
"""


Told = Callable[..., ServeConfig]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What `equipot serve` would run with, if told these words and this file."""
    caught: list[ServeConfig] = []

    async def keep(config: ServeConfig, announce: object) -> None:
        caught.append(config)

    monkeypatch.setattr(server, "run", keep)
    monkeypatch.setattr(cli, "configure", lambda style, level: None)

    def tell(*words: object, file: str | None = FILE) -> ServeConfig:
        asked = [str(word) for word in words]
        if file is not None:
            (tmp_path / "serve.toml").write_text(file)
            asked += ["--config", str(tmp_path / "serve.toml")]
        result = CliRunner().invoke(cli.app, asked)
        if result.exception is not None:
            raise result.exception
        return caught[-1]

    return tell


class TestFile:
    def test_a_file_says_what_flags_say(self, told: Told, tmp_path: Path) -> None:
        config = told()
        assert config.bundles == (tmp_path / "models" / "water",)
        assert (config.port, config.metrics_port, config.dtype) == (6000, None, "float64")
        assert (config.tls_cert, config.tls_key) == (Path("/etc/cert.pem"), tmp_path / "key.pem")
        assert config.drain_seconds == 5.0
        assert config.budget.queue_edges == 1000
        assert config.budget.batch_edges == default_budget("cpu").batch_edges
        assert config.calibrate
        assert config.limits.structure_atoms == 77
        assert config.limits.structure_edges == ServeConfig(bundles=(Path("a"),)).limits.structure_edges

    def test_flags_go_before_the_file_one_by_one(self, told: Told) -> None:
        words = ["--port", 7000, "--max-edges", 9, "--max-batch-edges", 64, "--no-reflection"]
        config = told(*words)
        assert (config.port, config.reflection, config.calibrate) == (7000, False, False)
        assert (config.limits.structure_atoms, config.limits.structure_edges) == (77, 9)
        assert (config.budget.batch_edges, config.budget.queue_edges) == (64, 1000)

    def test_bundles_of_the_command_line_start_where_it_was_typed(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path.parent)
        assert told("here").bundles == (tmp_path.parent / "here",)

    def test_a_repository_starts_from_there_as_paths_do(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path.parent)
        repository = told(file='[repository]\nurl = "models"').repository
        assert repository is not None
        assert repository.url == str(tmp_path / "models")

    def test_other_urls_of_a_repository_stay_as_they_are(self, told: Told) -> None:
        repository = told(file='[repository]\nurl = "s3://bucket/models"').repository
        assert repository is not None
        assert repository.url == "s3://bucket/models"

    def test_one_of_the_command_line_starts_where_it_was_typed(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path.parent)
        repository = told("--repository", "models").repository
        assert repository is not None
        assert repository.url == str(tmp_path.parent / "models")

    def test_no_file_and_no_flags_leave_the_defaults(self, told: Told) -> None:
        config = told("/bundle", file=None)
        assert config == ServeConfig(bundles=(Path("/bundle"),), calibrate=True)

    def test_calculators_files_start_where_they_are_named(
        self, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = tmp_path.parent, tmp_path / "more"
        monkeypatch.chdir(here)
        there.mkdir()
        (there / "one.toml").write_text('calculator = "./own.py:Own"\npython = "venv/bin/python"')
        file = '[[calculators]]\ncalculator = "mace:a.model"\n[[calculators]]\ncalculator = "chgnet"'
        assert [one.calculator for one in told(file=file).calculators] == [
            f"mace:{tmp_path / 'a.model'}",
            "chgnet",
        ]
        words = ("mace:b.model", "/abs/own.py:Own", there / "one.toml", "ase.calculators.emt:EMT")
        spelled = [word for name in words for word in ("--calculator", name)]
        found = told(*spelled, file=None).calculators
        assert [one.calculator for one in found] == [
            f"mace:{here / 'b.model'}",
            "/abs/own.py:Own",
            f"{there / 'own.py'}:Own",
            "ase.calculators.emt:EMT",
        ]
        assert [one.shown_name for one in found] == ["b", "own", "own", "emt"]
        assert found[2].python == str(there / "venv/bin/python")

    @pytest.mark.parametrize("other", [("--metrics-port", 9000), ("--metrics-host", "::1")])
    def test_no_metrics_goes_before_the_file_and_against_no_flag(
        self, told: Told, other: tuple[object, ...]
    ) -> None:
        assert told("--no-metrics", file=FILE.replace("= false", "= 9000")).metrics_port is None
        for words in (("--no-metrics", *other), (*other, "--no-metrics")):
            with pytest.raises(ServeError, match=f"--no-metrics and {other[0]} exclude each other"):
                told(*words)

    @pytest.mark.parametrize(
        "words", [["--replicas", 2], ["--max-replicas", 2], ["--mii", "--max-replicas", 2]]
    )
    def test_replicas_are_refused_where_one_server_would_start(self, told: Told, words: list[object]) -> None:
        with pytest.raises(ServeError, match=f"{words[-2]} is for servers under Ray"):
            told(*words)
        assert told(file=f"{FILE}\n[ray]\nreplicas = 2\n").port == 6000

    def test_the_log_and_the_batches_have_flags(self, told: Told) -> None:
        config = told("--log-level", "warning", "--max-batch-atoms", 99, "--ageing-seconds", 3)
        assert config.log_level == "warning"
        assert (config.budget.batch_atoms, config.budget.ageing_seconds) == (99, 3.0)
        assert (config.budget.queue_edges, config.calibrate) == (1000, True)

    def test_a_megabyte_is_two_to_the_twenty(self, told: Told) -> None:
        assert told("--max-message-mb", 3).limits.message_bytes == 3 * 2**20

    @pytest.mark.parametrize(
        ("mapping", "message"),
        [
            ({"prot": 1}, "prot is no setting; do you mean port?"),
            ({"metrics-port": 1}, "metrics-port is no setting; do you mean metrics_port?"),
            ({"limits": {"structure_atom": 1}}, "limits.structure_atom is no setting; do you mean struct"),
            ({"limits": {"xyz": 1}}, "limits.xyz is no setting; settings here are structure_atoms, "),
            ({"port": "50051"}, "port is '50051'; it takes a whole number"),
            ({"port": True}, "port is True; it takes a whole number"),
            ({"port": 1.5}, "port is 1.5; it takes a whole number"),
            ({"metrics_port": "none"}, "metrics_port is 'none'; it takes a whole number or false"),
            ({"deterministic": 1}, "deterministic is 1; it takes true or false"),
            ({"dtype": "half"}, "dtype is 'half'; it takes 'float32' or 'float64' or false"),
            ({"bundles": "bundle"}, "bundles is 'bundle'; it takes a list"),
            ({"bundles": [1]}, "bundles is [1]; it takes a path"),
            ({"limits": 5}, "limits is 5; it takes a table"),
            ({"budget": 5}, "budget is 5; it takes a table"),
            ({"device": 5}, "device is 5; it takes a string"),
            ({"port": 70_000}, "port is 70000, allowed are 0 to 65535"),
            ({"budget": {"ageing_seconds": 0}}, "ageing-seconds is 0, allowed are seconds above 0"),
            ({"limits": {"structure_atoms": 0}}, "max-atoms is 0, allowed are 1 or more"),
        ],
    )
    def test_what_does_not_fit_is_named(self, mapping: Mapping[str, object], message: str) -> None:
        with pytest.raises(ServeError) as caught:
            ServeConfig.from_mapping({"bundles": ["bundle"], **mapping}, base=Path())
        assert message in str(caught.value)

    def test_a_file_that_cannot_be_read(self, told: Told, tmp_path: Path) -> None:
        with pytest.raises(ServeError, match="is no TOML file"):
            told(file="port = ")
        with pytest.raises(ServeError, match="No such file"):
            told("--config", tmp_path / "none.toml", file=None)


@pytest.mark.slow
def test_a_server_runs_from_a_file(bundles: Bundles, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f'bundles = ["{bundles.tiny}"]\nmax_connection_age = 0\n[limits]\nstructure_atoms = 5\n')
    systems = [molecule(1, 4), molecule(2, 6)]
    with (
        running("--config", file, stderr=tmp_path / "log") as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        answer = read(PotentialServiceStub(channel).Predict(ask(systems), timeout=60), systems)
    assert [failure.index for failure in answer.failures] == [1]


def test_a_repository_is_told_by_flags_and_by_file(told: Told, tmp_path: Path) -> None:
    file = 'admins = ["*"]\n[repository]\nurl = "models"\npoll = 5\npreload = "none"\n'
    config = told("--max-loaded", 3, "--default-model", "water", "--admin", "ops", "--admin", "*", file=file)
    assert config.repository is not None
    assert (config.repository.url, config.repository.poll, config.repository.max_loaded) == (
        str(tmp_path / "models"),
        5.0,
        3,
    )
    assert (config.repository.default, config.repository.preload.value) == ("water", "none")
    assert config.admins == ("ops", "*")
