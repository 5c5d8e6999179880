"""The compiled sweeps: the same numbers, one build per machine, and work goes on without them."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equipot.model import compiled_sweeps, kernels, message_sweeps
from equipot.model.block_work import Inputs, Wanted
from equipot.model.blocks import block_edges
from equipot.model.message_sweeps import Direction

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.kernel_status())

# Asks a fresh process, which has no library loaded.
ASK = "from equipot.model.kernels import kernel_status; print(kernel_status())"


def ask(**environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@needs_kernels
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
# Widths below, at and above what one vector loop takes at once, and no multiple of it.
@pytest.mark.parametrize("width", [5, 32, 100, 300])
@pytest.mark.parametrize("keep", [False, True])
def test_every_sweep_gives_what_the_one_in_torch_gives(
    dtype: torch.dtype, rtol: float, width: int, keep: bool
) -> None:
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n_atoms, n_edges = 30, 700
    receivers = torch.randint(0, n_atoms, (n_edges,), generator=generator).sort().values
    senders = torch.randint(0, n_atoms, (n_edges,), generator=generator)
    edges = block_edges(senders, receivers, n_atoms, size=128)
    shapes = [(n_atoms, width), (n_atoms, width), (n_edges, 7), (n_edges, 1), (width, 7)]
    tensors = [normal(*s) for s in shapes]
    x = Inputs._make([*tensors, normal(width, width) / width**0.5, normal(width)])
    # Far beyond where exp overflows in float32, and where it underflows.
    x.at_receiver[0, :2] = 200.0
    x.at_receiver[1, :2] = -200.0
    g_out, g_push, t = (
        normal(n_atoms, width),
        normal(n_atoms, width),
        Direction(*(normal(*s) for s in shapes[:4])),
    )
    everything, geometry = Wanted(*[True] * 6), Wanted(False, True, True, True, False, False)
    results = []
    for sweeps in (message_sweeps, compiled_sweeps):
        total, y = sweeps.forward(x, edges, keep=keep)
        first, _ = sweeps.reverse(x, edges, g_out, everything, y_kept=y)
        some, g_hidden = sweeps.reverse(x, edges, g_push, geometry, y_kept=y, keep=keep)
        assert some.at_receiver is None
        assert some.w_down is None
        pushed, t_y = sweeps.push(x, edges, t, y_kept=y, keep=keep)
        both = sweeps.reverse_push(
            x, edges, g_out, g_push, t, everything, y_kept=y, t_y_kept=t_y, g_hidden_kept=g_hidden
        )
        alone = sweeps.reverse_push(
            x, edges, None, g_push, Direction(None, t.at_sender, None, None), everything, y_kept=y
        )
        part = [tensor for tensor in some if tensor is not None]
        results.append([total, *first, *part, pushed, *both, *alone])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(b, a, rtol=0.0, atol=rtol * float(a.abs().max()))


@needs_kernels
def test_not_a_number_stays_one() -> None:
    receivers = torch.tensor([0, 0, 1])
    edges = block_edges(torch.tensor([1, 2, 0]), receivers, 3)
    x = Inputs(*(torch.ones(s) for s in [(3, 40), (3, 40), (3, 2), (3, 1), (40, 2), (40, 40), (40,)]))
    x.at_receiver[1, 7] = torch.nan
    total, _ = compiled_sweeps.forward(x, edges)
    assert bool(total[1].isnan().all())
    assert not bool(total[0].isnan().any())


def test_two_threads_give_the_same_bits_every_time() -> None:
    receivers = torch.arange(600) // 20
    edges = block_edges(receivers.flip(0), receivers, 30)
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 300), (30, 300), (600, 4), (600, 1), (300, 4), (300, 300), (300,)]
    x = Inputs(*(torch.randn(*s, generator=generator) for s in shapes))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runs = [
            kernels.sweeps_for(x).reverse(x, edges, x.at_sender, Wanted(*[True] * 6))[0] for _ in range(3)
        ]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_without_a_compiler_there_is_a_reason_and_no_error(tmp_path: Path) -> None:
    status = ask(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-compiler")
    assert status.startswith("pure torch: ")
    assert "compiler" in status


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert ask(TORCH_EXTENSIONS_DIR=str(tmp_path / "file")).startswith("pure torch: ")


@needs_kernels
@pytest.mark.slow
def test_a_killed_build_keeps_nobody_waiting(tmp_path: Path) -> None:
    # What such a build leaves: a lock file that nobody holds, and a folder with torch's own lock in it.
    cache = tmp_path / kernels.cache_folder().name
    left = cache / "build-left"
    left.mkdir(parents=True)
    (left / "lock").write_text("")
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert ask(TORCH_EXTENSIONS_DIR=str(tmp_path)).startswith("compiled")
    assert not left.exists()


def test_the_cache_is_of_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    here = kernels.cache_folder()
    monkeypatch.setattr(kernels, "_processor", lambda: "another")
    assert kernels.cache_folder() != here
