"""Which rank owns what, and how momenta reach their owner and directions return.

Replicated parameters (DDP): the ranks share the work. A matrix whose LMO needs the whole of it belongs to one rank. If the
rule works entry by entry (sign, AdamW), each rank owns some rows. Only the owner keeps momentum. One all-gather brings the
directions of a bucket to all ranks, which move their weights by the same numbers, so the weights stay bit-identical.

Sharded parameters (FSDP2: DTensor): momentum is sharded like its parameter. One all-to-all brings the pieces of the momentum to
the rank that computes the direction, and another takes the pieces of the direction back.

What is sent depends on the parameter groups alone and never on which gradients a rank happens to have. So a `.grad` that is
None on some rank does not make another rank wait. Such a parameter is sent as zeros, with a flag that says whether it moves.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# torch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of this tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_by(ranks: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that share replicated parameters (default: all ranks); None for one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = ranks or dist.group.WORLD
    return ranks if ranks is not None and ranks.size() > 1 else None


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


class Ownership:
    """Who computes the direction of each parameter: one rank, or every rank for its own rows."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int | None] = {}
        self._load: dict[dist.ProcessGroup, list[float]] = {}

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

    def owner(self, p: Tensor) -> int | None:
        """The rank that computes the direction; None if every rank does so for its own rows."""
        return self._owner[p]

    def rows(self, p: Tensor, rank: int, size: int) -> tuple[int, int]:
        """The rows [first, end) of a replicated parameter that a rank owns; empty if it owns none."""
        owner = self._owner[p]
        length = p.shape[0] if p.ndim else 1
        if owner is None:
            held = cuts(length, size)
            return sum(held[:rank]), sum(held[: rank + 1])
        return (0, length) if owner == rank else (0, 0)


def _cost(p: Tensor) -> float:
    """Operations of a polar factor, up to a constant."""
    return float(p.numel()) * (min(p.shape[0], math.prod(p.shape[1:])) if p.ndim > 1 else 1)


class Piece(NamedTuple):
    """Some rows of the direction of a bucket's member."""

    member: int
    rows: slice
    direction: Tensor


class Alone:
    """How momenta reach their owner and directions return. Base case: no communication.

    A bucket calls `gather`, `whole`, `spread`, `receive`, in this order. Only `whole` and `receive` wait.
    """

    def gather(self, inputs: Callable[[], list[Tensor | None]]) -> None:
        """Start to bring the LMO's inputs, this rank's part of each member, to their owners."""
        self._inputs = inputs

    def whole(self) -> list[Tensor | None]:
        """The inputs that this rank computes directions of; None for the other members."""
        return self._inputs()

    def spread(self, directions: list[Tensor | None]) -> None:
        """Start to send these directions; None for a member that stays or that is computed elsewhere."""
        self._directions = directions

    def receive(self) -> tuple[list[Piece], Tensor | None]:
        """All directions, in pieces; 1 or 0 for each piece if only its owner knows whether it moves."""
        directions, self._directions = self._directions, []
        return [Piece(i, slice(None), d) for i, d in enumerate(directions) if d is not None], None


class Replicated(Alone):
    """The same parameters on every rank of a process group: one all-gather, padded to the largest part."""

    def __init__(self, params: Sequence[Tensor], owners: Ownership, ranks: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._ranks, self._dtype, self._device = ranks, dtype, params[0].device
        self._parts: list[list[tuple[int, slice, torch.Size]]] = []
        for rank in range(ranks.size()):
            part = []
            for i, p in enumerate(params):
                first, end = owners.rows(p, rank, ranks.size())
                if end > first:
                    rows = slice(first, end) if p.ndim else slice(None)
                    part.append((i, rows, torch.Size((end - first, *p.shape[1:])) if p.ndim else p.shape))
            self._parts.append(part)

    def spread(self, directions: list[Tensor | None]) -> None:
        numels = [sum(shape.numel() + 1 for *_, shape in part) for part in self._parts]
        mine = self._parts[self._ranks.rank()]
        sent = torch.empty(max(numels), dtype=self._dtype, device=self._device)
        _pack([directions[i] for i, *_ in mine], [shape for *_, shape in mine], sent)
        got = sent.new_empty(self._ranks.size() * len(sent))
        # Bytes, because not every backend knows every dtype.
        work = _all_gather(got.view(torch.uint8), sent.view(torch.uint8), group=self._ranks, async_op=True)
        self._travelling = work, sent, got  # `sent` must live until the message has left

    def receive(self) -> tuple[list[Piece], Tensor | None]:
        work, _, got = self._travelling
        del self._travelling
        work.wait()
        pieces, flags = [], []
        for part, flat in zip(self._parts, got.view(self._ranks.size(), -1).unbind(), strict=True):
            directions, moves = _unpack(flat, [shape for *_, shape in part])
            pieces += [Piece(i, rows, d) for (i, rows, _), d in zip(part, directions, strict=True)]
            flags.append(moves)
        return pieces, torch.cat(flags)


class Sharded(Alone):
    """DTensors that are split along the same dimension over the ranks of one mesh dimension: an all-to-all each way."""

    def __init__(self, params: Sequence[DTensor], owners: Ownership, ranks: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._ranks, self._dtype, self._device = ranks, dtype, local(params[0]).device
        along = sharded_along(params[0])
        assert along is not None
        self._dim = along[1]
        self._cuts = [cuts(p.shape[self._dim], ranks.size()) for p in params]
        self._shapes = [p.shape for p in params]
        self._members = [[i for i, p in enumerate(params) if owners.owner(p) == r] for r in range(ranks.size())]

    def _shape(self, member: int, rank: int) -> torch.Size:
        """The shape of a rank's piece of a member."""
        shape = self._shapes[member]
        return torch.Size((*shape[: self._dim], self._cuts[member][rank], *shape[self._dim + 1 :]))

    def gather(self, inputs: Callable[[], list[Tensor | None]]) -> None:
        me, mine = self._ranks.rank(), self._members[self._ranks.rank()]
        sent = [sum(self._shape(i, me).numel() for i in members) for members in self._members]
        got = [sum(self._shape(i, r).numel() for i in mine) for r in range(self._ranks.size())]
        pieces = [piece for piece in inputs() if piece is not None]  # every rank has its part of every member
        flat = torch.cat([pieces[i].reshape(-1) for members in self._members for i in members])
        self._travelling = _AllToAll(flat, sent, got, self._ranks)

    def whole(self) -> list[Tensor | None]:
        mine = self._members[self._ranks.rank()]
        parts: list[list[Tensor]] = [[] for _ in mine]
        for r, block in enumerate(self._travelling.wait()):
            shapes = [self._shape(i, r) for i in mine]
            for part, piece, shape in zip(parts, block.split([s.numel() for s in shapes]), shapes, strict=True):
                part.append(piece.view(shape))
        result: list[Tensor | None] = [None] * len(self._shapes)
        for i, part in zip(mine, parts, strict=True):
            result[i] = torch.cat(part, dim=self._dim)
        return result

    def spread(self, directions: list[Tensor | None]) -> None:
        me, mine, size = self._ranks.rank(), self._members[self._ranks.rank()], self._ranks.size()
        blocks = []
        for r in range(size):
            shapes = [self._shape(i, r) for i in mine]
            block = torch.empty(sum(s.numel() + 1 for s in shapes), dtype=self._dtype, device=self._device)
            _pack([self._cut(directions[i], i, r) for i in mine], shapes, block)
            blocks.append(block)
        got = [sum(self._shape(i, me).numel() + 1 for i in members) for members in self._members]
        self._travelling = _AllToAll(torch.cat(blocks), [b.numel() for b in blocks], got, self._ranks)

    def _cut(self, direction: Tensor | None, member: int, rank: int) -> Tensor | None:
        """A rank's piece of a direction."""
        if direction is None:
            return None
        held = self._cuts[member]
        return direction.reshape(self._shapes[member]).narrow(self._dim, sum(held[:rank]), held[rank])

    def receive(self) -> tuple[list[Piece], Tensor | None]:
        travelling = self._travelling
        del self._travelling  # and with it the memory of what has arrived
        pieces, flags = [], []
        for members, block in zip(self._members, travelling.wait(), strict=True):
            directions, moves = _unpack(block, [self._shape(i, self._ranks.rank()) for i in members])
            pieces += [Piece(i, slice(None), d) for i, d in zip(members, directions, strict=True)]
            flags.append(moves)
        return pieces, torch.cat(flags)


def _pack(tensors: Sequence[Tensor | None], shapes: Sequence[torch.Size], flat: Tensor) -> None:
    """Fill a flat tensor: the members, zeros for None, and then a 1 or 0 for each. Flags are made on the device."""
    start = 0
    for t, shape in zip(tensors, shapes, strict=True):
        room = flat[start : start + shape.numel()].view(shape)
        room.zero_() if t is None else room.copy_(t.view(shape) if t.is_contiguous() else t.reshape(shape))
        start += shape.numel()
    flags = flat[start : start + len(tensors)].fill_(1)
    for i, t in enumerate(tensors):
        if t is None:
            flags[i].zero_()
    flat[start + len(tensors) :].zero_()


def _unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[list[Tensor], Tensor]:
    """The members and the flags that `_pack` wrote."""
    sizes = [s.numel() for s in shapes]
    used = flat[: sum(sizes) + len(shapes)]
    *pieces, flags = used.split([*sizes, len(shapes)])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], flags


class _AllToAll:
    """An all-to-all in flight. It keeps its input alive until `wait`."""

    def __init__(self, flat: Tensor, sent: list[int], got: list[int], ranks: dist.ProcessGroup) -> None:
        self._got, self._output = got, flat.new_empty(sum(got))
        self._input: Tensor | None = flat
        self._work = dist.all_to_all_single(self._output, flat, got, sent, group=ranks, async_op=True)

    def wait(self) -> tuple[Tensor, ...]:
        """What each rank sent."""
        self._work.wait()
        self._input = None
        return self._output.split(self._got)
