"""Every form of the model obeys the physics of `equipot.model.testing`."""

from collections.abc import Callable

import pytest
import torch

from equipot.model.batch import Graph
from equipot.model.potential import Potential
from equipot.model.testing import CHECKS, CONSERVATIVE_CHECKS, Check, check_rotation, predict

KINDS = ("molecules", "crystals", "mixed")


@pytest.mark.parametrize("messages", ["fast", "lean", "split", "plain"])
@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_symmetries_and_limits(
    check: Check,
    kind: str,
    forces: str,
    messages: str,
    structures: dict[str, list[Graph]],
    make_model: Callable[..., Potential],
) -> None:
    check(make_model(forces=forces, messages=messages), structures[kind])


@pytest.mark.parametrize("messages", ["fast", "lean", "split", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CONSERVATIVE_CHECKS, ids=lambda check: check.__name__)
def test_forces_and_stress_are_the_energys_gradient(
    check: Check,
    kind: str,
    messages: str,
    structures: dict[str, list[Graph]],
    make_model: Callable[..., Potential],
) -> None:
    check(make_model(messages=messages), structures[kind])


@pytest.mark.parametrize(
    "fields",
    [{"residual": False}, {"residual": "initial"}, {"normalisation": "none"}, {"layers": 1}],
    ids=lambda fields: str(*fields.values()),
)
@pytest.mark.parametrize("architecture", ["egnn", "moments"])
@pytest.mark.parametrize("check", [*CHECKS, CONSERVATIVE_CHECKS[0]], ids=lambda check: check.__name__)
def test_other_configs_obey_too(
    check: Check,
    architecture: str,
    fields: dict[str, object],
    structures: dict[str, list[Graph]],
    make_model: Callable[..., Potential],
) -> None:
    check(make_model(architecture=architecture, **fields), structures["mixed"])


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_moments_obey(
    check: Check,
    kind: str,
    forces: str,
    structures: dict[str, list[Graph]],
    make_model: Callable[..., Potential],
) -> None:
    check(make_model(architecture="moments", forces=forces), structures[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CONSERVATIVE_CHECKS, ids=lambda check: check.__name__)
def test_forces_and_stress_of_moments_are_the_energys_gradient(
    check: Check, kind: str, structures: dict[str, list[Graph]], make_model: Callable[..., Potential]
) -> None:
    check(make_model(architecture="moments"), structures[kind])


@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize("architecture", ["egnn", "moments"])
def test_float32_obeys_within_its_precision(
    architecture: str, forces: str, structures: dict[str, list[Graph]], make_model: Callable[..., Potential]
) -> None:
    model = make_model(architecture=architecture, forces=forces, dtype=torch.float32)
    for check in CHECKS:
        check(model, structures["mixed"])


def test_a_model_that_reads_coordinates_is_caught(
    structures: dict[str, list[Graph]], make_model: Callable[..., Potential]
) -> None:
    class FeelsTheFrame(Potential):
        def total_energy(self, batch, atomic, element_idx):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            tilt = torch.zeros(batch.n_systems, dtype=torch.float64).index_add(
                0, batch.system_idx, batch.positions[:, 0].double()
            )
            return super().total_energy(batch, atomic, element_idx) + 1e-3 * tilt

    honest = make_model()
    model = FeelsTheFrame(honest.config, honest.references).double().eval()
    with pytest.raises(AssertionError, match="rotation or inversion"):
        check_rotation(model, structures["molecules"])


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_plain_and_split_are_the_same_function(
    forces: str, structures: dict[str, list[Graph]], make_model: Callable[..., Potential]
) -> None:
    plain, split = (make_model(forces=forces, messages=form) for form in ("plain", "split"))
    split.load_state_dict(plain.state_dict())
    for one, other in zip(
        predict(plain, structures["mixed"]), predict(split, structures["mixed"]), strict=True
    ):
        assert one.energy == pytest.approx(other.energy, abs=1e-12, rel=1e-13)
        assert abs(one.forces - other.forces).max() < 1e-12
