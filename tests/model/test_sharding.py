"""A potential spread over real ranks against the same potential whole."""

import copy
import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn as start_processes

from equipot.model.batch import Graph, SystemBatch, collate
from equipot.model.bundle import load_potential, write_bundle
from equipot.model.errors import ModelError
from equipot.model.potential import Potential
from equipot.model.process_group import ProcessGroup
from equipot.model.sharding import check_divisible, cut_of, parallel_config, spread

WIDTH = 24  # halves of it divide by 2, 3 and 4
MakeModel = Callable[..., Potential]


FORCES = ("conservative", "direct")


@pytest.fixture(scope="module")
def potentials(make_model: MakeModel) -> dict[str, Potential]:
    return {forces: make_model(forces=forces, width=WIDTH) for forces in FORCES}


def on_ranks(count: int, folder: Path, work: Callable[..., Any], *args: object) -> list[Any]:
    """What `work(group, *args)` returned on each of so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_rank, (count, port, folder, work, args), nprocs=count)  # type: ignore[no-untyped-call]
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(count)]


def _rank(rank: int, count: int, port: int, folder: Path, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(work(ProcessGroup(), *args)))
    dist.destroy_process_group()


def predicted(potential: Potential, batch: SystemBatch) -> tuple[Any, ...]:
    stress = potential.force_head is None
    out = potential(batch, stress=stress)
    alone = potential(batch, forces=False)
    return (
        out.energy.numpy(),
        out.forces.numpy(),
        out.stress.numpy() if stress else None,
        alone.energy.numpy(),
    )


def _gradients(potential: Potential, graphs: list[Graph]) -> dict[str, Any]:
    potential.requires_grad_(True).train()
    out = potential(collate(graphs, dtype=torch.float64))
    weights = torch.linspace(0.5, 1.5, len(out.forces)).unsqueeze(-1)
    ((out.energy / 100).square().sum() + (weights * out.forces).square().sum()).backward()
    return {name: parameter.grad for name, parameter in potential.named_parameters()}


def _work(group: ProcessGroup, folder: Path, graphs: list[Graph]) -> dict[str, Any]:
    """Predictions from bundles, then gradients of fresh parts, for both kinds of forces."""
    results = {}
    for forces in FORCES:
        part, card = load_potential(folder / forces, group=group)
        held = {name: parameter.numel() for name, parameter in part.named_parameters()}
        prediction = predicted(part, collate(graphs, dtype=torch.float64))
        whole, _ = load_potential(folder / forces)
        trained = Potential(parallel_config(card.config), card.references).double()
        trained.load_state_dict(whole.state_dict())
        spread(trained, group)
        results[forces] = prediction, held, _gradients(trained, graphs)
    return results


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_predict_and_differentiate_what_one_process_does(
    potentials: dict[str, Potential], structures: dict[str, list[Graph]], tmp_path: Path, ranks: int
) -> None:
    graphs = [graph for group in structures.values() for graph in group]
    for forces, potential in potentials.items():
        write_bundle(
            tmp_path / forces,
            name="model",
            config=potential.config,
            references=potential.references,
            tensors=potential.state_dict().items(),
            provenance={},
            metrics={},
            dtype=torch.float64,
        )
    results = on_ranks(ranks, tmp_path, _work, tmp_path, graphs)
    for forces, potential in potentials.items():
        expected = predicted(potential, collate(graphs, dtype=torch.float64))
        gradients = _gradients(copy.deepcopy(potential), graphs)
        whole = {name: parameter.numel() for name, parameter in potential.named_parameters()}
        matrices = [name for name, size in whole.items() if "layers" in name and size == WIDTH**2]
        assert len(matrices) == 6 * potential.config.layers
        for rank, result in enumerate(results):
            found, held, slices = result[forces]
            for one, other in zip(found, expected, strict=True):
                if other is not None:
                    np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)
            assert all(held[name] * ranks == whole[name] for name in matrices)
            for name, gradient in gradients.items():
                cut = cut_of(name, tuple(gradient.shape), rank, ranks)
                if not cut.zero:
                    part = (
                        gradient
                        if cut.dim is None
                        else gradient.narrow(cut.dim, cut.start, cut.stop - cut.start)
                    )
                    np.testing.assert_allclose(slices[name], part, rtol=1e-9, atol=1e-10, err_msg=name)


def test_the_slices_of_all_ranks_make_up_each_parameter(potentials: dict[str, Potential]) -> None:
    for name, parameter in potentials["direct"].named_parameters():
        cuts = [cut_of(name, tuple(parameter.shape), rank, 4) for rank in range(4)]
        if cuts[0].dim is None:
            assert not cuts[0].zero
            continue
        parts = [
            parameter.narrow(cut.dim, cut.start, cut.stop - cut.start) for cut in cuts if cut.dim is not None
        ]
        assert torch.equal(torch.cat(parts, dim=cuts[0].dim), parameter)


def test_a_width_that_does_not_divide_is_refused_with_those_that_do(potentials: dict[str, Potential]) -> None:
    config = potentials["direct"].config
    with pytest.raises(ModelError, match=r"width 24 .* 5 ranks .* 1, 2, 3, 4, 6, 12"):
        check_divisible(config, 5)
    with pytest.raises(ModelError, match="architecture"):
        check_divisible(replace(config, architecture="other"), 2)


def test_one_rank_is_the_whole_potential(
    potentials: dict[str, Potential], structures: dict[str, list[Graph]]
) -> None:
    class Alone:
        rank, size = 0, 1

        def __getattr__(self, name: str) -> None:
            raise AssertionError("one rank has nobody to talk to")

    batch = collate(structures["mixed"], dtype=torch.float64)
    for potential in potentials.values():
        part = copy.deepcopy(potential)
        spread(part, Alone())  # type: ignore[arg-type]
        for found, expected in zip(predicted(part, batch), predicted(potential, batch), strict=True):
            np.testing.assert_equal(found, expected)
