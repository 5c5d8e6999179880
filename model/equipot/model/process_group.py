"""A `sharding.Group` over torch.distributed. Knows no models, and not who started the processes."""

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """All ranks of a process group, or of torch's default one.

    Attributes:
        rank: this process's place.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = group

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, added up in float32 or wider; a new tensor."""
        total = values.to(_wide(values.dtype), copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total.to(values.dtype)

    def gather(self, values: Tensor) -> Tensor:
        """All ranks' values (n, c) side by side: (n, size · c)."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values, group=self._group)
        return torch.cat(parts, dim=-1)

    def sum_slice(self, values: Tensor) -> Tensor:
        """This rank's columns (n, c) of the sum of all ranks' values (n, size · c)."""
        parts = [part.contiguous() for part in values.to(_wide(values.dtype)).chunk(self.size, dim=-1)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=self._group)
        return own.to(values.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
