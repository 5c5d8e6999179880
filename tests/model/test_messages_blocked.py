"""The blocked message function is the plain one: values, first and second derivatives, refusals."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from equipot.model import kernels, messages, messages_blocked
from equipot.model.batch import System, SystemBatch, build_graph, collate
from equipot.model.block_work import Inputs
from equipot.model.blocks import block_edges
from equipot.model.config import ModelConfig
from equipot.model.egnn import EGNN
from equipot.model.messages_blocked import sum_messages
from equipot.model.potential import Potential
from equipot.model.references import References


@pytest.fixture(autouse=True)
def _by_blocks_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Graphs for tests are so small that the fast form would take the split one.
    monkeypatch.setattr(messages, "LEAST", messages.Least(0, 0))


@pytest.fixture(params=["compiled", "torch"])
def sweeps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds of sweeps, where there are both."""
    if request.param == "torch":
        with kernels.pure_torch():
            yield
        return
    if not kernels.available():
        pytest.skip(kernels.kernel_status())
    yield


# Relative, in float64, as the house asks.
RTOL = 1e-10

Sum = Callable[[Inputs], Tensor]


class Case(NamedTuple):
    """A random graph and random inputs on it."""

    x: Inputs
    senders: Tensor
    receivers: Tensor
    n_atoms: int


def make_case(n_atoms: int, n_edges: int, width: int, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(n_edges)

    def normal(*shape: int) -> Tensor:
        return (
            (0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        )

    x = Inputs(
        normal(n_atoms, width),
        normal(n_atoms, width),
        normal(n_edges, 5),
        normal(n_edges, 1),
        normal(width, 5),
        normal(width, width),
        normal(width),
    )
    # Neither the first nor the last atom receives anything, and some between them may not.
    receivers = torch.randint(1, n_atoms - 1, (n_edges,), generator=generator).sort().values
    return Case(x, torch.randint(0, n_atoms, (n_edges,), generator=generator), receivers, n_atoms)


def plain(case: Case) -> Sum:
    def run(x: Inputs) -> Tensor:
        z = x.at_receiver[case.receivers] + x.at_sender[case.senders] + x.radial @ x.w_radial.t()
        messages = x.envelope * functional.silu(functional.silu(z) @ x.w_down.t() + x.b_down)
        out = messages.new_zeros(case.n_atoms, messages.shape[1])
        return out.index_add(0, case.receivers, messages)

    return run


def blocked(case: Case, *, keep: Literal[0, 1, 3], size: int) -> Sum:
    edges = block_edges(case.senders, case.receivers, case.n_atoms, size=size)
    return lambda x: sum_messages(x, edges, keep=keep)


def two_rounds(f: Sum, x: Inputs) -> tuple[Tensor, list[Tensor], Inputs]:
    """An energy of two rounds of messages, what forces are taken by, and the inputs built on that."""
    geometry = [1.0 * x.radial, 1.0 * x.envelope]
    first = x._replace(radial=geometry[0], envelope=geometry[1])
    summed = f(first)
    second = first._replace(at_receiver=torch.sin(summed), at_sender=torch.cos(summed))
    return f(second).square().sum(), geometry, first


def energy_gradients(f: Sum, x: Inputs) -> list[Tensor]:
    energy, _, _ = two_rounds(f, x)
    return [energy, *torch.autograd.grad(energy, x)]


def force_gradients(f: Sum, x: Inputs, *, with_energy: bool) -> list[Tensor]:
    energy, geometry, _ = two_rounds(f, x)
    pulls = torch.autograd.grad(energy, geometry, create_graph=True)
    loss = sum((pull.sin() * pull).sum() for pull in pulls)
    loss = loss + energy.square() if with_energy else loss
    assert isinstance(loss, Tensor)
    return [loss, *torch.autograd.grad(loss, x)]


def assert_same(expected: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        scale = float(a.detach().abs().max()) if a.numel() else 0.0
        torch.testing.assert_close(b, a, rtol=0.0, atol=RTOL * scale)


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("keep", [0, 1, 3], ids=["lean", "balanced", "fast"])
@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize(("n_atoms", "n_edges"), [(20, 300), (3, 1), (40, 2000), (4, 0)])
def test_values_and_derivatives_are_those_of_the_plain_form(
    n_atoms: int, n_edges: int, size: int, keep: Literal[0, 1, 3]
) -> None:
    case = make_case(n_atoms, n_edges, 9)
    fast = blocked(case, keep=keep, size=size)
    assert_same([plain(case)(case.x)], [fast(case.x)])
    assert_same(energy_gradients(plain(case), case.x), energy_gradients(fast, case.x))
    for with_energy in (False, True):
        assert_same(
            force_gradients(plain(case), case.x, with_energy=with_energy),
            force_gradients(fast, case.x, with_energy=with_energy),
        )


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("keep", [0, 1, 3], ids=["lean", "balanced", "fast"])
def test_derivatives_are_those_of_finite_differences(keep: Literal[0, 1, 3]) -> None:
    case = make_case(5, 12, 3)
    f = blocked(case, keep=keep, size=4)
    # The second time only where it is provided: after a first by what depends on positions.
    weights = [w.detach() for w in case.x[4:]]
    assert torch.autograd.gradcheck(lambda *x: f(Inputs(*x)), tuple(case.x))
    assert torch.autograd.gradgradcheck(lambda *x: f(Inputs(*x, *weights)), tuple(case.x[:4]))


@pytest.mark.usefixtures("sweeps")
def test_several_pulls_on_one_sum_add_up() -> None:
    case = make_case(20, 300, 9)

    def gradients(f: Sum) -> list[Tensor]:
        energy, geometry, first = two_rounds(f, case.x)
        one = torch.autograd.grad(energy, geometry, create_graph=True)[0]
        two = torch.autograd.grad(energy.sin(), [first.radial], create_graph=True)[0]
        loss = one.square().sum() + two.sin().sum()
        return [loss, *torch.autograd.grad(loss, case.x)]

    assert_same(gradients(plain(case)), gradients(blocked(case, keep=3, size=64)))


@pytest.mark.usefixtures("sweeps")
def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    case = make_case(20, 300, 9)
    energy, geometry, _ = two_rounds(blocked(case, keep=3, size=64), case.x)
    (pull, _) = torch.autograd.grad(energy, geometry, create_graph=True)
    loss = pull.square().sum()
    once = torch.autograd.grad(loss, case.x, retain_graph=True)
    again = torch.autograd.grad(loss, case.x)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.usefixtures("sweeps")
def test_what_is_not_provided_is_refused() -> None:
    case = make_case(20, 300, 9)
    f = blocked(case, keep=0, size=64)
    energy, geometry, _ = two_rounds(f, case.x)
    with pytest.raises(RuntimeError, match="messages = 'split'"):
        torch.autograd.grad(energy, case.x.w_down, create_graph=True)
    energy, geometry, _ = two_rounds(f, case.x)
    pull = torch.autograd.grad(energy, geometry, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(pull.square().sum(), geometry, create_graph=True)


def test_a_share_left_behind_is_never_added_to_another_pass() -> None:
    case = make_case(20, 300, 9)
    f = blocked(case, keep=0, size=64)
    out = f(case.x)
    g = torch.ones_like(out, requires_grad=True)
    pull = torch.autograd.grad(out, case.x.radial, g, create_graph=True)[0]
    # This pass ends at g, before the messages whose gradient it would have to complete.
    torch.autograd.grad(pull.square().sum(), g, retain_graph=True)
    with pytest.raises(RuntimeError, match="ended before"):
        torch.autograd.grad(out.sum(), case.x.radial)


def test_blocks_hold_every_edge_once_and_split_no_receiver() -> None:
    receivers = torch.tensor([2] * 5 + [3] * 70 + [7] * 30 + [8] * 30 + [11] * 4)
    edges = block_edges(torch.zeros_like(receivers), receivers, 20, size=64)
    stops = [block.stop for block in edges.blocks]
    assert [block.start for block in edges.blocks] == [0, *stops[:-1]]
    assert stops == [5, 75, 139]
    for block in edges.blocks:
        own = receivers[block.start : block.stop]
        assert block.first_atom <= int(own.min())
        assert int(own.max()) < block.last_atom
    assert edges.longest == 70


def make_batch(
    dtype: torch.dtype, names: tuple[str, ...] = ("crystal", "isolated", "molecule")
) -> SystemBatch:
    rng = np.random.default_rng(5)
    spread = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)[:20]
    nowhere, open_space, periodic = np.zeros((3, 3)), np.zeros(3, dtype=bool), np.ones(3, dtype=bool)
    systems = {
        # In a cell shorter than the cutoff an atom sees several images of itself.
        "crystal": System(
            np.array([6, 8]), np.array([[0.1, 0, 0], [1.4, 1.5, 1.3]]), 2.9 * np.eye(3) + 0.2, periodic
        ),
        "isolated": System(np.array([1]), np.zeros((1, 3)), nowhere, open_space),
        "molecule": System(
            rng.choice([1, 6, 8], 20), 1.6 * spread + rng.uniform(-0.2, 0.2, (20, 3)), nowhere, open_space
        ),
    }
    return collate([build_graph(systems[name], 4.0) for name in names], dtype=dtype)


def make_model(form: Any, forces: str, dtype: torch.dtype, width: int = 12) -> Potential:
    config = ModelConfig(
        width=width,
        layers=2,
        radial=6,
        cutoff=4.0,
        forces=forces,  # type: ignore[arg-type]
        messages=form,
        elements=(1, 6, 8),
        levels_of_theory=("a", "b"),
        mean_neighbors=18.0,
    )
    torch.manual_seed(3)
    return Potential(config, References(energy=np.ones((2, 3)), scale=np.ones(2))).to(dtype)


def step(model: Potential, batch: SystemBatch) -> list[Tensor]:
    conservative = model.config.forces == "conservative"
    found = model(batch, stress=conservative)
    loss = found.energy.sin().sum() + found.forces.square().sum()
    if conservative:
        loss = loss + found.stress.nan_to_num().square().sum()
    model.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    outputs = [found.energy, found.forces, *([found.stress.nan_to_num()] if conservative else [])]
    return [t.detach() for t in [*outputs, *gradients]]


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("form", ["lean", "balanced", "fast", ("lean", "split")])
@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize(
    "names", [("crystal", "isolated", "molecule"), ("molecule",), ("isolated",), ("isolated", "crystal")]
)
def test_a_training_step_is_that_of_the_plain_form(form: str, forces: str, names: tuple[str, ...]) -> None:
    batch = make_batch(torch.float64, names)
    expected = step(make_model("plain", forces, torch.float64), batch)
    assert_same(expected, step(make_model(form, forces, torch.float64), batch))


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("forces", ["conservative", "direct"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrow_dtypes_stay_near_float64(forces: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = step(make_model("plain", forces, torch.float64), make_batch(torch.float64))
    batch = make_batch(torch.float32)
    for form in ("lean", "balanced", "fast"):
        found = step(make_model(form, forces, dtype), batch)
        assert found[0].dtype == torch.float64
        for a, b in zip(reference, found, strict=True):
            assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())


@pytest.mark.usefixtures("sweeps")
def test_autocast_keeps_to_one_dtype_in_both_passes() -> None:
    batch = make_batch(torch.float32)
    reference = step(make_model("fast", "conservative", torch.float32), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(make_model("fast", "conservative", torch.float32), batch)
    for a, b in zip(reference, found, strict=True):
        assert float((a - b).abs().max()) <= 0.1 * float(a.abs().max())


@pytest.mark.parametrize("form", ["lean", "fast"])
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_checkpointed_layers_give_the_same_step(form: str, forces: str) -> None:
    batch = make_batch(torch.float64)
    model = make_model(form, forces, torch.float64)
    expected = step(model, batch)
    assert isinstance(model.backbone, EGNN)
    model.backbone.run_layer = partial(checkpoint, use_reentrant=False)
    assert_same(expected, step(model, batch))


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_the_fast_form_says_the_same_on_both_sides_of_its_threshold(
    forces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(torch.float64)
    expected = step(make_model("plain", forces, torch.float64), batch)
    numbers = 12 * batch.n_edges
    calls: list[int] = []
    by_blocks = messages_blocked.sum_messages

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return by_blocks(*args, **kwargs)

    monkeypatch.setattr(messages, "sum_messages", counted)
    for least, layers_by_blocks in ((numbers, 2), (numbers + 1, 0)):
        monkeypatch.setattr(messages, "LEAST", messages.Least(least, least))
        calls.clear()
        assert_same(expected, step(make_model("fast", forces, torch.float64), batch))
        assert len(calls) == layers_by_blocks
