"""Whoever compiles a potential gets the same numbers, or hears why not."""

from collections.abc import Callable, Iterator

import pytest
import torch

from equipot.model.batch import Graph, SystemBatch, collate
from equipot.model.errors import ModelError
from equipot.model.potential import Potential, Prediction

MakeModel = Callable[..., Potential]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def batches(structures: dict[str, list[Graph]]) -> list[SystemBatch]:
    """Of two sizes: the second one shows whether the first's were built in."""
    return [collate(structures[kind], dtype=torch.float64) for kind in ("mixed", "molecules")]


def compiled(model: Potential) -> Callable[..., Prediction]:
    # The whole compiler but for the code that it would write at last, which takes a minute.
    made: Callable[..., Prediction] = torch.compile(model, backend="aot_eager", dynamic=True)
    return made


def forces_of(prediction: Prediction) -> torch.Tensor:
    assert prediction.forces is not None
    return prediction.forces


@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_compiled_inference_gives_the_same_numbers(
    make_model: MakeModel, batches: list[SystemBatch], forces: str
) -> None:
    model = make_model(messages="split", layers=1, forces=forces)
    quick = compiled(model)
    for batch in batches:
        expected, found = model(batch), quick(batch)
        torch.testing.assert_close(found.energy, expected.energy)
        torch.testing.assert_close(forces_of(found), forces_of(expected))


def test_compiled_training_of_direct_forces_gives_the_same_gradients(
    make_model: MakeModel, batches: list[SystemBatch]
) -> None:
    model = make_model(messages="split", layers=1, forces="direct").train()
    gradients = []
    for call in (model, compiled(model)):
        model.zero_grad()
        prediction = call(batches[0])
        (prediction.energy.square().mean() + forces_of(prediction).square().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_compiled_training_of_conservative_forces_is_refused(
    make_model: MakeModel, batches: list[SystemBatch]
) -> None:
    model = make_model(messages="split").train()
    with pytest.raises(ModelError, match=r"second derivative.*train uncompiled"):
        compiled(model)(batches[0])
    # Without the refusal, torch fails only in the backward pass.


@pytest.mark.parametrize("form", ["fast", "lean"])
def test_compiled_blocks_are_refused(make_model: MakeModel, batches: list[SystemBatch], form: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be compiled.*messages = 'split'"):
        compiled(make_model(messages=form))(batches[0])
