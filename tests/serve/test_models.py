"""Models are found by name and digest, and levels of theory by name, or refused with what there is."""

from __future__ import annotations

import pytest
from tests.serve.conftest import Bundles

from equipot.serve.config import ServeConfig
from equipot.serve.errors import InvalidRequest, NotServed, ServeError
from equipot.serve.registry import Registry


@pytest.fixture(scope="module")
def registry(bundles: Bundles) -> Registry:
    return Registry.load(ServeConfig(bundles=(bundles.tiny, bundles.direct)))


def test_the_first_bundle_is_the_default(registry: Registry) -> None:
    assert registry.find("").name == "tiny"


def test_a_digest_may_be_whole_or_cut_short(registry: Registry) -> None:
    model = registry.find("direct")
    whole = f"direct@{model.card.digest}"
    assert registry.find(whole) is model
    assert registry.find(whole[: len("direct@sha256:") + 8]) is model


@pytest.mark.parametrize(
    "wanted", ["none", "tiny@sha256:00000000", "Tiny", "sha256:00000000", "tiny@7", "tiny@12345678"]
)
def test_what_is_not_served_is_answered_by_what_is(registry: Registry, wanted: str) -> None:
    with pytest.raises(NotServed, match=r"served are tiny@sha256:\w{64}"):
        registry.find(wanted)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:1234567", "sha256:XYZXYZXYZ", "-", "a b"])
def test_what_is_no_digest_is_refused(registry: Registry, digest: str) -> None:
    with pytest.raises(InvalidRequest, match="digest"):
        registry.find(f"tiny@{digest}")


def test_a_level_of_theory_must_be_named_where_there_are_several(registry: Registry) -> None:
    tiny, direct = registry.find("tiny"), registry.find("direct")
    assert tiny.level_index("") == tiny.level_index("PBE") == 0
    assert direct.level_index("B3LYP") == 1
    with pytest.raises(InvalidRequest, match="'PBE', 'B3LYP'"):
        direct.level_index("")
    with pytest.raises(NotServed, match=r"'CCSD'.*'PBE', 'B3LYP'"):
        direct.level_index("CCSD")


def test_two_bundles_of_one_name_are_refused(bundles: Bundles) -> None:
    with pytest.raises(ServeError, match="two bundles are called 'tiny'"):
        Registry.load(ServeConfig(bundles=(bundles.tiny, bundles.tiny)))


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_a_device_that_cannot_compute_is_refused(bundles: Bundles, device: str) -> None:
    with pytest.raises(ServeError, match=f"device '{device}' cannot be used"):
        Registry.load(ServeConfig(bundles=(bundles.tiny,), device=device))
