"""How momenta reach the rank that computes a direction, and how directions return: one linear function for each case.

Each is a generator of one bucket's update that pauses while a message travels, so that the next bucket can begin
(`in_turns`). Before it pauses, it drops what it no longer needs.

Replicated parameters (DDP): one all-gather brings the directions of a bucket to all ranks, which move their weights by the
same numbers, so the weights stay bit-identical. Sharded parameters (FSDP2): one all-to-all brings the pieces of the momentum
to the rank that computes the direction, and another takes the pieces of the direction back.

What is sent depends on the parameter groups alone and never on which gradients a rank happens to have. So a `.grad` that is
None on some rank does not make another rank wait. Such a parameter is sent as zeros, with a flag that says whether it moves.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .buckets import Bucket, Piece
from .shares import Shares, cuts, local, sharded_along

# torch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Task = Iterator[None]


def in_turns(tasks: Iterable[Task]) -> None:
    """Run the tasks to their end. While the message of one travels, the next one begins."""
    running: list[Task] = []
    for task in tasks:
        running = [t for t in (task, *running) if next(t, True) is None]
    while running:
        running = [t for t in running if next(t, True) is None]


def alone(bucket: Bucket) -> Task:
    """One process, or members that every rank moves by itself: no message."""
    directions = bucket.directions(bucket.inputs())
    bucket.move([Piece(i, slice(None), d) for i, d in enumerate(directions) if d is not None], None)
    yield from ()


def replicated(bucket: Bucket, shares: Shares, ranks: dist.ProcessGroup) -> Task:
    """The same parameters on every rank: one all-gather, padded to the largest part."""
    parts: list[list[tuple[int, slice, torch.Size]]] = []  # of each rank: member, rows, shape
    for rank in range(ranks.size()):
        part = []
        for i, p in enumerate(bucket.params):
            first, end = shares.rows(p, rank)
            if end > first:
                rows, shape = (slice(first, end), (end - first, *p.shape[1:])) if p.ndim else (slice(None), ())
                part.append((i, rows, torch.Size(shape)))
        parts.append(part)
    numels = [sum(shape.numel() + 1 for *_, shape in part) for part in parts]
    mine = parts[ranks.rank()]

    directions = bucket.directions(bucket.inputs())
    sent = torch.empty(max(numels), dtype=bucket.travel_dtype, device=bucket.params[0].device)
    _pack([directions[i] for i, *_ in mine], [shape for *_, shape in mine], sent)
    del directions
    got = sent.new_empty(ranks.size() * len(sent))
    # Bytes, because not every backend knows every dtype.
    work = _all_gather(got.view(torch.uint8), sent.view(torch.uint8), group=ranks, async_op=True)
    yield
    work.wait()
    del work, sent

    pieces, flags = [], []
    for part, flat in zip(parts, got.view(ranks.size(), -1).unbind(), strict=True):
        arrived, moves = _unpack(flat, [shape for *_, shape in part])
        pieces += [Piece(i, rows, d) for (i, rows, _), d in zip(part, arrived, strict=True)]
        flags.append(moves)
    bucket.move(pieces, torch.cat(flags))


def sharded(bucket: Bucket, shares: Shares, ranks: dist.ProcessGroup) -> Task:
    """DTensors that are split along the same dimension over the ranks of one mesh dimension: an all-to-all each way."""
    first = bucket.params[0]
    assert isinstance(first, DTensor)
    along = sharded_along(first)
    assert along is not None
    dim, me, size = along[1], ranks.rank(), ranks.size()
    held = [cuts(p.shape[dim], size) for p in bucket.params]  # of each member: what each rank has of it
    members = [[i for i, p in enumerate(bucket.params) if shares.owner(p) == r] for r in range(size)]
    mine = members[me]

    def shape(member: int, rank: int) -> torch.Size:
        """The shape of a rank's piece of a member."""
        whole = bucket.params[member].shape
        return torch.Size((*whole[:dim], held[member][rank], *whole[dim + 1 :]))

    parts = bucket.inputs()  # every rank has its part of every member
    flat = torch.cat([_present(parts[i]).reshape(-1) for there in members for i in there])
    del parts
    sizes = [sum(shape(i, r).numel() for i in mine) for r in range(size)]
    got, work = _all_to_all(flat, [sum(shape(i, me).numel() for i in there) for there in members], sizes, ranks)
    yield
    work.wait()
    del work, flat

    blocks = [block.split([shape(i, r).numel() for i in mine]) for r, block in enumerate(got.split(sizes))]
    inputs: list[Tensor | None] = [None] * len(bucket.params)
    for k, i in enumerate(mine):
        inputs[i] = torch.cat([block[k].view(shape(i, r)) for r, block in enumerate(blocks)], dim)
    del blocks, got
    directions = bucket.directions(inputs)
    del inputs
    numels = [sum(shape(i, r).numel() + 1 for i in mine) for r in range(size)]
    flat = torch.empty(sum(numels), dtype=bucket.travel_dtype, device=local(first).device)
    for r, block in enumerate(flat.split(numels)):
        pieces = [_cut(directions[i], bucket.params[i].shape, dim, sum(held[i][:r]), held[i][r]) for i in mine]
        _pack(pieces, [shape(i, r) for i in mine], block)
    del directions, pieces
    sizes = [sum(shape(i, me).numel() + 1 for i in there) for there in members]
    got, work = _all_to_all(flat, numels, sizes, ranks)
    yield
    work.wait()
    del work, flat

    moved, flags = [], []
    for there, block in zip(members, got.split(sizes), strict=True):
        arrived, moves = _unpack(block, [shape(i, me) for i in there])
        moved += [Piece(i, slice(None), d) for i, d in zip(there, arrived, strict=True)]
        flags.append(moves)
    bucket.move(moved, torch.cat(flags))


def _all_to_all(flat: Tensor, sent: list[int], got: list[int], ranks: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Start an all-to-all. Its input must stay alive until the work is done."""
    output = flat.new_empty(sum(got))
    return output, dist.all_to_all_single(output, flat, got, sent, group=ranks, async_op=True)


def _present(part: Tensor | None) -> Tensor:
    assert part is not None
    return part


def _cut(direction: Tensor | None, shape: torch.Size, dim: int, start: int, length: int) -> Tensor | None:
    """A rank's piece of the direction of a parameter of this shape."""
    return None if direction is None else direction.reshape(shape).narrow(dim, start, length)


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
