"""Where AdamW's moments of a parameter lie at each ZeRO stage. Knows DeepSpeed's optimizers, imports none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Moments:
    """This rank's moments, fp32, and how many updates made them.

    Args:
        adam: torch's optimizer, as it was given to DeepSpeed.
        zero: what DeepSpeed made of it.
        stage: of ZeRO.
        in_files: the moments are read into a buffer that the next ones overwrite.
    """

    def __init__(self, adam: torch.optim.Optimizer, zero: Any, *, stage: int, in_files: bool) -> None:  # noqa: ANN401
        self._adam = adam
        self._zero = zero
        self._stage = stage
        self._in_files = in_files

    @property
    def updates(self) -> int:
        """Updates made so far; before the first there are no moments."""
        state = self._adam.state.get(self._flats()[0])
        return int(state["step"]) if state else 0

    def begin(self, updates: int) -> None:
        """Make the moments, as nothing, as if after so many updates."""
        for group, flat in enumerate(self._flats()):
            with self._group_in_memory(group, changed=True):
                self._adam.state[flat] = {
                    "step": torch.tensor(float(updates), device=flat.device),
                    **{name: torch.zeros_like(flat) for name in MOMENTS},
                }

    @contextlib.contextmanager
    def in_memory(self, parameter: nn.Parameter, *, changed: bool = False) -> Iterator[None]:
        """What is in files of this parameter is in memory inside the block: read once, however often used.

        Args:
            parameter: whose master weights and moments are wanted.
            changed: whether they are to be written back.
        """
        if not self._in_files:
            yield
            return
        group, _, _ = self._position(parameter)
        with self._group_in_memory(group, changed=changed):
            yield

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's padded part of the fp32 weights at stage 3; if in files, while :meth:`in_memory`."""
        if self._in_files:
            return self._local(parameter, None)
        part: torch.Tensor = self._zero.get_local_fp32_param(parameter)
        return part.detach()

    def read(self, parameter: nn.Parameter, name: str) -> torch.Tensor:
        """This rank's part of a moment, flat (at stage 0 all of it, at stage 3 padded)."""
        if self._in_files:
            return self._local(parameter, name).clone()
        if self._stage == 3:
            part: torch.Tensor = self._zero.get_local_fp32_param(parameter, name)
            return part
        return self._part(parameter, name)

    def write(self, parameter: nn.Parameter, name: str, values: torch.Tensor) -> None:
        """Replace what :meth:`read` gives."""
        if self._in_files:
            self._local(parameter, name).copy_(values)
        elif self._stage == 3:
            self._zero.set_local_hp_param(values, parameter, name)
        else:
            self._part(parameter, name).copy_(values)

    @contextlib.contextmanager
    def _group_in_memory(self, group: int, *, changed: bool) -> Iterator[None]:
        # Parts below a megabyte are in no file.
        in_file = self._in_files and self._zero._swappable_optimizer_subgroup(group)
        if in_file:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if in_file and changed:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        elif in_file:
            self._zero._release_swap_buffers(group)

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        group, start, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return group, start, length

    def _local(self, parameter: nn.Parameter, name: str | None) -> torch.Tensor:
        group, start, length = self._position(parameter)
        flat = self._flats()[group]
        values: torch.Tensor = flat if name is None else self._adam.state[flat][name]
        return values.detach().narrow(0, start, length)

    def _part(self, parameter: nn.Parameter, name: str) -> torch.Tensor:
        if self._stage == 0:
            whole: torch.Tensor = self._adam.state[parameter][name]
            return whole.view(-1)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0)
        flat = self._adam.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.hp_fragment_address
        part: torch.Tensor = self._adam.state[flat][name][address.start : address.start + address.numel]
        return part

    def _flats(self) -> list[torch.Tensor]:
        if self._stage == 3:
            flats: list[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
            return flats
        return [flat for group in self._adam.param_groups for flat in group["params"]]
