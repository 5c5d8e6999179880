"""What both Helms make of many values is valid, for Kubernetes' and the operators' own definitions."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from .cases import BAD, FAST, GOOD
from .conftest import CHART, HELMS, LOADER, ROOT, Helm, Object, Render

VERSIONS = ("1.27", "1.32", "1.37")
CRDS = ROOT.parent / "shared" / "crds"
FOREIGN = {"Certificate": "cert-manager", "PodMonitor": "Prometheus' operator"}
"""Kinds whose definitions are not at hand; their fields are asserted on in test_chart."""


def cases() -> list[Any]:
    return [
        pytest.param(name, case, marks=[] if case in FAST else [pytest.mark.slow])
        for case in GOOD
        for name in HELMS
    ]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema that knows nulls and int-or-string, and refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key not in ("format", "default")}
    if schema.get("x-kubernetes-int-or-string") is True:
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("nullable") is True and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


@functools.cache
def custom(kind: str) -> dict[str, jsonschema.Draft7Validator]:
    """A validator for each version of a kind that an operator defines."""
    for file in CRDS.glob("*.yaml"):
        if f"_{kind.lower()}s." not in file.name:
            continue
        definition = yaml.load(file.read_text(), Loader=LOADER)
        group = definition["spec"]["group"]
        return {
            f"{group}/{version['name']}": jsonschema.Draft7Validator(custom_root(version))
            for version in definition["spec"]["versions"]
        }
    pytest.fail(f"no definition of {kind}: put it there, or name it in FOREIGN")


def custom_root(version: Object) -> Any:
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def is_built_in(item: Object) -> bool:
    group = item["apiVersion"].split("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway."))


@pytest.mark.parametrize(("name", "case"), cases())
def test_objects_are_valid_for_three_kubernetes_versions(name: str, case: str, render: Render) -> None:
    for item in render(name, case):
        if is_built_in(item) and item["kind"] != "LeaderWorkerSet":
            for version in VERSIONS:
                kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize(("name", "case"), cases())
def test_custom_objects_are_what_their_operators_define(name: str, case: str, render: Render) -> None:
    objects = [
        item
        for item in render(name, case)
        if not (is_built_in(item) and item["kind"] != "LeaderWorkerSet") and item["kind"] not in FOREIGN
    ]
    if objects and not CRDS.is_dir():
        pytest.skip(f"no definitions of custom resources in {CRDS}")
    for item in objects:
        errors = sorted(custom(item["kind"])[item["apiVersion"]].iter_errors(item), key=str)
        assert not errors, "\n".join(f"{list(error.path)}: {error.message}" for error in errors)


def test_the_strict_form_of_a_definition_refuses_what_it_does_not_know() -> None:
    if not CRDS.is_dir():
        pytest.skip(f"no definitions of custom resources in {CRDS}")
    good = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "x"},
        "spec": {"scaleTargetRef": {"name": "x"}, "triggers": [{"type": "prometheus", "metadata": {}}]},
    }
    validator = custom("ScaledObject")["keda.sh/v1alpha1"]
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, "spec": {**good["spec"], "replicaCount": 1}})  # type: ignore[dict-item]


@pytest.mark.parametrize("case", FAST)
def test_both_helms_render_the_same(case: str, render: Render) -> None:
    old, new = (sorted(map(str, render(name, case))) for name in HELMS)
    assert old == new


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize("case", ["baked", "everything"])
def test_the_chart_has_no_lint(name: str, case: str, helm: Helm) -> None:
    done = helm(name, "lint", "--strict", str(CHART), values=GOOD[case])
    assert done.code == 0, done.out + done.err
    assert "[WARNING]" not in done.out
    assert "[ERROR]" not in done.out


@pytest.mark.parametrize("name", HELMS)
def test_wrong_values_are_refused_by_name(name: str, helm: Helm) -> None:
    wrong = []
    for case, (values, says) in BAD.items():
        done = helm(name, "template", "lab", str(CHART), values=values)
        if done.code == 0 or says not in done.err:
            wrong.append(f"{case}: exit code {done.code}, {done.err.strip()[-300:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", HELMS)
def test_what_kubernetes_knows_is_passed_through_unseen(name: str, helm: Helm) -> None:
    values = {
        **GOOD["baked"],
        "affinity": {"podAntiAffinity": {}},
        "resources": {"requests": {"example.com/fpga": 1}},
        "containerSecurityContext": {"appArmorProfile": {"type": "RuntimeDefault"}},
        "autoscaling": {"kind": "hpa", "behavior": {"scaleUp": {"tolerance": "0.05"}}},
    }
    done = helm(name, "template", "lab", str(CHART), values=values)
    assert done.code == 0, done.err
    for word in ("example.com/fpga", "appArmorProfile", "tolerance", "readOnlyRootFilesystem"):
        assert word in done.out


def test_no_line_of_the_chart_says_helm_has_rendered_a_go_map(render: Render) -> None:
    for case in FAST:
        assert "map[" not in str(render("helm3", case)).replace("map[string]", "")


def test_the_chart_is_small_enough_for_a_release(tmp_path: Path) -> None:
    """A release is a secret of at most 1 MiB, with the chart in it."""
    size = sum(file.stat().st_size for file in CHART.rglob("*") if file.is_file())
    assert size < 600_000
