"""What is generated from the chart's values, or copied into it, is up to date."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from .conftest import CHART, ROOT, parsed


def check(*words: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "chart_docs.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=120)


def test_readme_schema_and_copies_are_regenerated_without_a_difference(tool: Callable[[str], str]) -> None:
    done = check(tool("readme-generator"), "--check")
    assert done.returncode == 0, done.stderr


def test_the_copies_are_those_of_the_server() -> None:
    """Without the generator, too: alerts that differ from the server's metrics are of no use."""
    monitoring = ROOT / "serve" / "equipot" / "serve" / "monitoring"
    for name in ("rules.yaml", "dashboard.json"):
        assert (CHART / "files" / name).read_text() == (monitoring / name).read_text()


def test_the_schema_closes_our_own_keys_and_opens_those_of_kubernetes() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def closed(part: dict[str, object]) -> bool:
        return part.get("additionalProperties") is False

    assert closed(schema)
    for own in ("image", "storage", "server", "autoscaling", "tls", "auth", "monitoring", "termination"):
        assert closed(schema["properties"][own]), own
    for passed in ("affinity", "resources", "podSecurityContext", "containerSecurityContext", "nodeSelector"):
        assert not closed(schema["properties"][passed]), passed


def test_compose_starts_the_server_with_words_that_it_knows() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    service = compose["services"]["serve"]
    assert parsed(service["command"])["bundles"] == [Path("/models/bundle")]
    assert parsed(service["healthcheck"]["test"][2:])["service"] == "equipot.readiness"
    words = dict(word[2:].split("=") for word in service["command"] if "=" in word)
    assert int(service["stop_grace_period"][:-1]) > sum(
        int(words[f"{x}-seconds"]) for x in ("linger", "drain")
    )
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert (ROOT / compose["configs"]["rules"]["file"]).is_file()
    scrape = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"]
    assert scrape[0]["dns_sd_configs"][0]["names"] == ["serve"]
