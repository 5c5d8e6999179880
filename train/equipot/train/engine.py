"""DeepSpeed's one room in training: ZeRO, precision, clipping, and where each part of the state lies."""

from __future__ import annotations

import atexit
import contextlib
import copy
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# DeepSpeed chooses its accelerator while it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

from equipot.train.errors import TrainError
from equipot.train.moments import MOMENTS, Moments
from equipot.train.recipe import LARGEST_BUCKET, MOST_GATHERED, Recipe, ZeroSection
from equipot.train.scratch import nvme_problem, scratch_directory
from equipot.train.world import World
from equipot.train.zero3_tangents import let_tangents_through


def start_world() -> World:
    """Join the other ranks by the environment's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Once a process: DeepSpeed keeps the groups it made, so a second call is answered with the same world.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # Otherwise init_distributed compiles a C++ extension: a minute, and a crash where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(hours=1),  # rank 0 may count the edges of a large store meanwhile
        )
        atexit.register(dist.destroy_process_group)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def _import_optimizers() -> None:
    """Import an optimizer of DeepSpeed's that decorates itself with torch.compile, without that decorator.

    DeepSpeed imports it to recognise it; ours is another, and loading torch's compiler takes seconds a rank.
    """
    decorator = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # older DeepSpeeds have none
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorator


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of one parameter this rank has."""

    name: str
    shape: tuple[int, ...]
    offset: int  # into the flattened parameter
    length: int  # 0 if the rank has no part


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """This rank's part of one parameter's fp32 master copy, which the next optimizer step may change."""

    name: str
    shape: tuple[int, ...]
    offset: int  # into the flattened parameter
    values: torch.Tensor  # flat; empty if the rank has no part


Reader = Callable[[str, str, int, int], torch.Tensor]
"""Flat fp32 values by kind (weights or a moment), parameter, offset and length."""


_NO_NORM = torch.tensor(float("inf"))


class Engine:
    """A module under DeepSpeed: `module(*inputs)` must return a tuple that begins with the loss."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        world: World,
        *,
        fresh: Iterable[tuple[str, torch.Tensor]] = (),
    ) -> None:
        """Args:
        module: what is trained.
        recipe: how.
        world: this rank's place.
        fresh: values for parameters that are on the meta device, by name; asked for one at a time, so that
            at stage 3 no rank ever holds more than one of them whole.
        """
        self.world = world
        self._stage = recipe.zero.stage
        self._in_files = recipe.zero.offload_optimizer == "nvme"
        if self._in_files and (problem := nvme_problem()) is not None:
            raise TrainError(
                f'zero.offload_optimizer = "nvme" is {problem[0]}. {problem[1]}, or '
                'zero.offload_optimizer = "cpu"'
            )
        groups = _parameter_groups(module, recipe.optimizer.weight_decay)
        n_elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
        configuration = _configuration(recipe, n_elements)
        _fill(module, fresh, configuration)
        parameters = dict(module.named_parameters())
        self._names = {name: p for name, p in parameters.items() if p.requires_grad}
        self._frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self._gradient_norm = 0.0
        optimizer = torch.optim.AdamW(
            [{**group, "params": [self._names[name] for name in group["params"]]} for group in groups],
            lr=recipe.optimizer.learning_rate,
            betas=recipe.optimizer.betas,
            fused=True,
        )
        _import_optimizers()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=configuration, dist_init_required=False
        )
        if self._stage == 3:
            let_tangents_through(module, LinearFunctionForZeroStage3)
        self._moments = Moments(optimizer, self._optimizer, stage=self._stage, in_files=self._in_files)

    @property
    def module(self) -> nn.Module:
        """The module with its working weights (under ZeRO-3: fetched while it computes)."""
        module: nn.Module = self._engine.module
        return module

    def forward_backward(self, *inputs: object, last: bool) -> tuple[torch.Tensor, ...]:
        """One micro-batch: the module's outputs, detached. Ranks' gradients are averaged after the last.

        All ranks compute equally many in a step; how many may change from step to step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        outputs: tuple[torch.Tensor, ...] = self._engine(*inputs)
        # Micro-batches add up: what the loss is normalised by is the caller's affair.
        self._engine.backward(outputs[0], scale_wrt_gas=False)
        if self._engine.is_gradient_accumulation_boundary():
            if self._stage == 0:
                gradients = [p.grad for p in self._names.values() if p.grad is not None]
                self._gradient_norm = float(nn.utils.get_total_norm(gradients))
        else:
            self._engine.step()  # counts the micro-batch
        return tuple(output.detach() for output in outputs)

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights; returns the gradient's norm before clipping.

        Where that is no finite number nothing is updated.
        """
        if self._stage == 0 and not math.isfinite(self._gradient_norm):
            self.discard()
            return self._gradient_norm
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if self._stage == 0:
            return self._gradient_norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def discard(self) -> None:
        """Forget the gradients that were made since the last update, and update nothing."""
        if self._stage == 0:
            self._engine.set_gradient_accumulation_boundary(False)
            self._engine.step()  # counts the micro-batch
            self._engine.zero_grad()
            return
        # DeepSpeed's own way of leaving out a step, which it takes by itself when the norm is not finite.
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        setattr(self._optimizer, name, lambda *_, **__: [_NO_NORM] if self._stage == 3 else _NO_NORM)
        try:
            self._engine.step()
        finally:
            delattr(self._optimizer, name)

    def places(self) -> Iterator[Place]:
        """Which parts this rank has, in the order of the module's parameters."""
        for name, parameter in self._names.items():
            yield self._place(name, parameter)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's parts of the fp32 master weights, in the order of the module's parameters."""
        for name, parameter in self._names.items():
            place = self._place(name, parameter)
            with self._moments.in_memory(parameter):
                values = self._master(parameter, place)
            yield Fragment(name, place.shape, place.offset, values)

    @property
    def updates(self) -> int:
        """Updates that the optimizer's moments have seen; with 0 there are none."""
        return self._moments.updates

    def states(self) -> Iterator[dict[str, torch.Tensor]]:
        """Master weights (``weights``) and moments, in parts like those of :meth:`fragments`; may be live."""
        kinds = MOMENTS if self.updates else ()
        for name, parameter in self._names.items():
            place = self._place(name, parameter)
            start = place.offset if self._stage == 0 else 0
            with self._moments.in_memory(parameter):
                state = {kind: self._moments.read(parameter, kind) for kind in kinds}
                weights = self._master(parameter, place)
            yield {
                "weights": weights,
                **{kind: values[start : start + place.length] for kind, values in state.items()},
            }

    def _place(self, name: str, parameter: nn.Parameter) -> Place:
        if self._stage == 3:
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            part, size = self._padded_length(parameter), torch.Size(shape).numel()
            offset = min(self.world.rank * part, size)
            return Place(name, shape, offset, min(part, size - offset))
        shape, size = tuple(parameter.shape), parameter.numel()
        if self._stage == 0:
            # Every rank holds all of it: take an even share.
            share = -(-size // self.world.size)
            offset = min(self.world.rank * share, size)
            return Place(name, shape, offset, min(share, size - offset))
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Place(name, shape, 0, 0)
        return Place(name, shape, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def _master(self, parameter: nn.Parameter, place: Place) -> torch.Tensor:
        if self._stage == 3:
            part = self._moments.master(parameter)
            if self._in_files:
                part = part.clone()  # it is in a buffer that the next one is read into
            return part[: place.length]  # the last parts are padded
        if self._stage == 0:
            return parameter.detach().view(-1)[place.offset : place.offset + place.length]
        if not place.length:
            return torch.empty(0, device=self.world.device)
        fragment: torch.Tensor = parameter._hp_mapping.hp_fragment.detach()  # type: ignore[attr-defined]
        return fragment

    @staticmethod
    def _padded_length(parameter: nn.Parameter) -> int:
        length: int = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        return length

    def load(self, read: Reader, *, updates: int) -> None:
        """Take up weights and moments that were saved by a run divided in whatever way.

        Args:
            read: gives any part of them; called for this rank's parts alone.
            updates: what :attr:`updates` was; with 0 no moments are asked for.
        """
        if updates or self.updates:
            self._moments.begin(updates)
            self._engine.global_steps = updates
        for name, parameter in self._names.items():
            place = self._place(name, parameter)
            kinds = ("weights", *MOMENTS) if updates else ("weights",)
            with self._moments.in_memory(parameter, changed=True):
                for kind in kinds:
                    values = self._part_of(read, kind, parameter, place)
                    self._take(parameter, kind, values)
                    if kind == "weights" and self._stage == 3:
                        self._set_local(parameter, values)
        if self._stage == 3:
            self._engine.empty_partition_cache()  # what is still gathered is stale
        elif self._stage:
            self._set_working(fragment.values for fragment in self.fragments())

    def load_frozen(self, read: Reader) -> None:
        """Take up the weights that are not trained; no checkpoint holds them, nor :meth:`fragments`."""
        for name, parameter in self._frozen.items():
            if self._stage == 3:
                place = self._place(name, parameter)
                self._set_local(parameter, read("weights", name, place.offset, place.length))
            else:
                parameter.data.view(-1).copy_(read("weights", name, 0, parameter.numel()))

    @staticmethod
    def _set_local(parameter: nn.Parameter, part: torch.Tensor) -> None:
        local = parameter.ds_tensor.data  # type: ignore[attr-defined]
        local[: part.numel()].copy_(part)

    def _part_of(self, read: Reader, kind: str, parameter: nn.Parameter, place: Place) -> torch.Tensor:
        if self._stage == 0:
            return read(kind, place.name, 0, parameter.numel())
        part = read(kind, place.name, place.offset, place.length)
        if self._stage < 3:
            return part
        padded = part.new_zeros(self._padded_length(parameter))
        padded[: place.length] = part
        return padded

    def _take(self, parameter: nn.Parameter, kind: str, values: torch.Tensor) -> None:
        if kind != "weights":
            self._moments.write(parameter, kind, values)
        elif self._in_files:
            self._moments.master(parameter).copy_(values)
        elif self._stage == 3:
            self._optimizer.set_local_hp_param(values, parameter)
        elif self._stage == 0:
            parameter.data.view(-1).copy_(values)
        elif len(values):
            parameter._hp_mapping.hp_fragment.data.copy_(values)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def swapped(self, parts: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside the block the module has other weights, given in parts like :meth:`fragments`' values."""
        kept = [p.detach().clone() for p in self._names.values()] if self._stage == 0 else []
        self._set_working(parts)
        try:
            yield
        finally:
            if self._stage == 0:
                for parameter, values in zip(self._names.values(), kept, strict=True):
                    parameter.data.copy_(values)
            else:
                self._set_working(fragment.values for fragment in self.fragments())

    def _set_working(self, parts: Iterable[torch.Tensor]) -> None:
        if self._stage == 3:
            self._engine.empty_partition_cache()  # what is still gathered from the last forward is stale
        for parameter, part, place in zip(self._names.values(), parts, self.places(), strict=True):
            if self._stage == 3:
                self._set_local(parameter, part)
                continue
            whole = torch.zeros(torch.Size(place.shape).numel(), device=self.world.device)
            whole[place.offset : place.offset + place.length] = part
            parameter.data.copy_(self.world.sum_tensor(whole).view(place.shape))


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [name for name, parameter in named if parameter.ndim > 1]
    others = [name for name, parameter in named if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _fill(
    module: nn.Module, fresh: Iterable[tuple[str, torch.Tensor]], configuration: dict[str, Any]
) -> None:
    """Put parameters in the place of those on the meta device; at stage 3 this rank's part of each."""
    dtype = torch.bfloat16 if configuration["bf16"]["enabled"] else torch.float32
    divided = configuration["zero_optimization"]["stage"] == 3
    for path, values in fresh:
        owner, _, name = path.rpartition(".")
        part = module.get_submodule(owner)
        trained = part.get_parameter(name).requires_grad
        setattr(part, name, nn.Parameter(values.to(dtype) if divided else values, requires_grad=trained))
        if divided and not any(parameter.is_meta for parameter in part.parameters()):
            # mutable on DeepSpeed's side
            deepspeed.zero.Init(module=part, config_dict_or_path=copy.deepcopy(configuration), dtype=dtype)
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise TrainError(f"{empty[0]} has no initial values: give its module a reset_parameters()")


def _configuration(recipe: Recipe, n_elements: int) -> dict[str, Any]:
    bucket = max(1024, min(n_elements, LARGEST_BUCKET))
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # We say which micro-batch is the last. Told their number, DeepSpeed would at stage 0 divide by it.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.clip,
        "steps_per_print": 2**62,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "zero_optimization": {
            "stage": recipe.zero.stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        | _offloading(recipe.zero),
        # DeepSpeed's own optimizer for the host would be compiled at first use; torch's is fused, too.
        "zero_force_ds_cpu_optimizer": False,
    }
    if recipe.zero.stage == 3:
        # A parameter kept gathered on every rank would go stale when other weights are swapped in.
        configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        configuration["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket
        # By DeepSpeed's own bounds a billion weights stay gathered on every rank.
        configuration["zero_optimization"]["stage3_max_live_parameters"] = MOST_GATHERED
        configuration["zero_optimization"]["stage3_max_reuse_distance"] = MOST_GATHERED
    if recipe.precision == "bf16":
        configuration["communication_data_type"] = "fp32"
    return configuration


def _offloading(zero: ZeroSection) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    pinned = torch.cuda.is_available()  # without a GPU there is no transfer to speed up
    if zero.offload_optimizer != "none":
        settings["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": pinned}
    if zero.offload_optimizer == "nvme" and zero.nvme_path is not None:
        settings["offload_optimizer"]["nvme_path"] = str(scratch_directory(zero.nvme_path))
        # Each weight in files of its own: to read one is to read all of its group, as much passes through
        # memory, and where weights share files DeepSpeed loses gradients that are not aligned in them.
        settings["sub_group_size"] = 1
    if zero.offload_parameters != "none":
        settings["offload_param"] = {"device": zero.offload_parameters, "pin_memory": pinned}
    return settings
