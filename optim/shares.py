"""Which part of the momenta is this rank's, and who computes which direction.

Replicated parameters (DDP): the ranks share the work. A matrix whose LMO needs the whole of it belongs to one rank. If the
direction of some rows depends on the same rows of the momentum alone (sign, AdamW, stacks of matrices), each rank owns some
rows. Only the owner keeps momentum.

Sharded parameters (FSDP2: DTensor): momentum is sharded like its parameter, and one rank computes the direction of each.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .saved import SavedShare


def local(tensor: Tensor) -> Tensor:
    """The part of this tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def buffer_dtype(p: Tensor) -> torch.dtype:
    """Momentum is float32 at least, and float64 for float64 parameters."""
    return torch.promote_types(p.dtype, torch.float32)


def sharded_along(param: DTensor) -> tuple[int, int] | None:
    """(mesh dimension, tensor dimension) that the parameter is split along; None if every rank holds all of it.

    Raises ValueError if it is split over more than one mesh dimension.
    """
    split = [(i, s) for i, s in enumerate(param.placements) if not s.is_replicate() and param.device_mesh.size(i) > 1]
    if not split:
        return None
    if len(split) > 1 or not isinstance(split[0][1], Shard):
        raise ValueError(
            f"params must be sharded along one mesh dimension at most (FSDP2, HSDP) for norms that need whole matrices, got "
            f"a parameter of shape {tuple(param.shape)} with placements {param.placements}"
        )
    return split[0][0], split[0][1].dim


def cuts(rows: int, ranks: int) -> list[int]:
    """How many of these rows each rank holds. DTensor splits like torch.chunk, so the last ranks may get none."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - r * chunk)) for r in range(ranks)]


def _cost(p: Tensor) -> float:
    """Operations of a polar factor, up to a constant."""
    return float(p.numel()) * (min(p.shape[0], math.prod(p.shape[1:])) if p.ndim > 1 else 1)


class Shares:
    """Who owns what among the ranks of a process group (default: all ranks), and among those of the DTensors' meshes."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.ranks: dist.ProcessGroup | None = None  # None for one process
        if dist.is_available() and dist.is_initialized():
            ranks = process_group or dist.group.WORLD
            self.ranks = ranks if ranks is not None and ranks.size() > 1 else None
        self._owner: dict[Tensor, int | None] = {}
        self._load: dict[dist.ProcessGroup, list[float]] = {}
        self._mesh: DeviceMesh | None = None
        self._layout_checked = False

    def assign(self, params: Sequence[Tensor], ranks: dist.ProcessGroup, by_rows: bool) -> None:
        """Give the members of one bucket their owners.

        Most expensive first, each to the rank with the least work so far. No rank gets more than its equal share of the bucket,
        because the all-gather pads every rank's part to the largest. `by_rows`: every rank owns some rows.
        """
        load = self._load.setdefault(ranks, [0.0] * ranks.size())
        count, most = [0] * ranks.size(), -(-len(params) // ranks.size())
        for p in sorted(params, key=_cost, reverse=True):
            if by_rows and p.ndim and not isinstance(p, DTensor):
                self._owner[p] = None
                continue
            free = [r for r in range(ranks.size()) if count[r] < most]
            self._owner[p] = owner = min(free, key=load.__getitem__)
            load[owner] += _cost(p)
            count[owner] += 1

    def forget(self, p: Tensor) -> None:
        """Keep nothing of a parameter that is no longer here."""
        self._owner.pop(p, None)

    def owner(self, p: Tensor) -> int | None:
        """The rank that computes the direction; None if every rank does so for its own rows."""
        return self._owner[p]

    def rows(self, p: Tensor, rank: int) -> tuple[int, int]:
        """The rows [first, end) of a replicated parameter that a rank owns; empty if it owns none."""
        assert self.ranks is not None
        owner = self._owner[p]
        length = p.shape[0] if p.ndim else 1
        if owner is None:
            held = cuts(length, self.ranks.size())
            return sum(held[:rank]), sum(held[: rank + 1])
        return (0, length) if owner == rank else (0, 0)

    def owns(self, p: Tensor) -> bool:
        """Whether this rank keeps (some of) the momentum of p."""
        if isinstance(p, DTensor) or self.ranks is None:
            return True
        if p.numel() == 0:
            return False
        first, end = self.rows(p, self.ranks.rank())
        return end > first

    def part(self, p: Tensor, whole: Tensor) -> Tensor:
        """The local part of a tensor shaped like p that this rank owns."""
        if isinstance(p, DTensor):
            return local(whole)
        if self.ranks is None or not p.ndim:
            return whole
        first, end = self.rows(p, self.ranks.rank())
        return whole[first:end]

    def gradient(self, p: Tensor) -> Tensor:
        """This rank's part of the gradient in the buffers' dtype; zero if there is none."""
        gradient = p.grad
        if gradient is None:
            return torch.zeros_like(self.part(p, p), dtype=buffer_dtype(p), requires_grad=False)
        if gradient.is_sparse:
            raise RuntimeError("sparse gradients are not supported: build the embedding with sparse=False")
        if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
            gradient = gradient.redistribute(placements=p.placements)  # tensor-parallel code may leave a partial sum
        return self.part(p, gradient).to(buffer_dtype(p))

    def new_buffer(self, p: Tensor) -> Tensor:
        """Zeros for this rank's part of a buffer of p."""
        part = p if isinstance(p, DTensor) else self.part(p, p)
        return torch.zeros_like(part, dtype=buffer_dtype(p), requires_grad=False)

    def copy(self, p: Tensor, buffer: Tensor, value: Tensor) -> None:
        """Copy a saved buffer into this one. Each may be whole, sharded or some rows."""
        if isinstance(buffer, DTensor):
            if not isinstance(value, DTensor):
                value = distribute_tensor(value.to(buffer.device), buffer.device_mesh, buffer.placements)
        elif isinstance(value, DTensor):
            value = local(value)
        else:
            value = self.part(p, value)
        buffer.copy_(value)

    def saved(self, p: Tensor, own: Tensor | None) -> Tensor:
        """A buffer of p as a state dict holds it: this rank's share, if the ranks share the parameter."""
        if p.numel() == 0 and own is None:
            return torch.zeros_like(p, dtype=buffer_dtype(p), requires_grad=False)
        if self.ranks is None or isinstance(p, DTensor):
            assert own is not None
            return own
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.ranks, p.device.type)
        return SavedShare.of(own, self._owner[p], p, buffer_dtype(p), self._mesh)

    def check_layout(self, params: Sequence[Tensor]) -> None:
        """Check once that the ranks hold the same parameters. If they did not, they would wait for each other forever.

        Raises RuntimeError. A collective.
        """
        if self._layout_checked or self.ranks is None:
            return
        shapes = [(tuple(p.shape), str(p.dtype)) for p in params if not isinstance(p, DTensor)]
        if not shapes:
            return
        layouts: list[object] = [None] * self.ranks.size()
        dist.all_gather_object(layouts, shapes, group=self.ranks)
        if any(layout != shapes for layout in layouts):
            raise RuntimeError(
                "the ranks of process_group hold different parameters; pass the group of the ranks that hold the same ones"
            )
        self._layout_checked = True
