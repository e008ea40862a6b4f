"""Who computes the LMO of which parameter, and how the others get it.

Every parameter has one owner among the ranks that share it. Where the model is replicated (DDP), the owner alone keeps the
momentum and broadcasts the direction; all ranks move their weights by what was broadcast, and so stay bit-identical. Where
parameters are sharded (FSDP2: DTensor), momentum is sharded like the parameter: one all-to-all brings the pieces of the
momentum to the owner, and another takes the pieces of the direction back.

What is sent follows the parameter groups and never what one rank found in `.grad`, so that a gradient that is None
somewhere makes nobody wait: a parameter that stays is sent as zeros, and a flag beside them says so.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """What of this tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_along(param: DTensor) -> tuple[int, int] | None:
    """(mesh dimension, tensor dimension) that the parameter is split along; None where every rank holds all of it.

    Raises ValueError where it is split over more than one mesh dimension.
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


class Ownership:
    """Gives every parameter an owner: the rank with the least work so far, dearest parameters of a group first."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}
        self._load: dict[dist.ProcessGroup | None, list[float]] = {}

    def __getitem__(self, param: Tensor) -> int:
        return self._owner[param]

    def assign(self, params: Sequence[Tensor], matrices: bool, ranks_of: Callable[[Tensor], dist.ProcessGroup | None]) -> None:
        """Assign each parameter to one of `ranks_of` it. `matrices`: the LMO costs matrix products."""

        def cost(p: Tensor) -> float:
            return float(p.numel()) * (min(p.shape[0], math.prod(p.shape[1:])) if matrices and p.ndim > 1 else 1)

        for p in sorted(params, key=cost, reverse=True):
            ranks = ranks_of(p)
            load = self._load.setdefault(ranks, [0.0] * (ranks.size() if ranks else 1))
            self._owner[p] = owner = load.index(min(load))
            load[owner] += cost(p)


class Alone:
    """The way of a bucket of parameters through a step; here without any exchange.

    For one process, and for directions that need nothing but this rank's own piece of the momentum. The others do the same
    four things with the members of a bucket, which come ordered by their owners. Nothing waits but `whole` and `receive`.
    """

    def gather(self, momenta: Callable[[], list[Tensor | None]]) -> None:
        """Start to bring the momenta (where they have to go nowhere, `whole` is what asks for them) to their owners."""
        self._momenta = momenta

    def whole(self) -> list[Tensor | None]:
        """The momenta that this rank computes directions of, None for the others."""
        momenta, self._momenta = self._momenta, None  # held on, a bucket and its directions would live until the next gc
        return momenta()

    def spread(self, directions: list[Tensor | None]) -> None:
        """Start to send these directions, None for a parameter that stays or that another rank owns."""
        self._directions = directions

    def receive(self) -> tuple[list[Tensor | None], Tensor | None]:
        """The direction of every member (None: it stays); 1 or 0 for each, if only its owner knows whether it moves."""
        return self._directions, None


class Replicated(Alone):
    """The same parameters on every rank of a process group: one broadcast per owner."""

    def __init__(self, params: Sequence[Tensor], owners: Sequence[int], ranks: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._ranks, self._dtype, self._device = ranks, dtype, params[0].device
        self._shapes = [p.shape for p in params]
        self._runs = [(owner, list(run)) for owner, run in itertools.groupby(range(len(params)), owners.__getitem__)]

    def spread(self, directions: list[Tensor | None]) -> None:
        self._travelling = []
        for owner, members in self._runs:
            if owner == self._ranks.rank():
                flat = _pack([directions[i] for i in members], [self._shapes[i] for i in members], self._dtype, self._device)
            else:
                numel = sum(self._shapes[i].numel() for i in members) + len(members)
                flat = torch.empty(numel, dtype=self._dtype, device=self._device)
            work = dist.broadcast(flat, dist.get_global_rank(self._ranks, owner), group=self._ranks, async_op=True)
            self._travelling.append((work, flat))  # which keeps the buffer alive until it is waited for

    def receive(self) -> tuple[list[Tensor | None], Tensor | None]:
        directions, flags = [], []
        for (_, members), (work, flat) in zip(self._runs, self._travelling, strict=True):
            work.wait()
            pieces, moves = _unpack(flat, [self._shapes[i] for i in members])
            directions += pieces
            flags.append(moves)
        self._travelling = []
        return directions, torch.cat(flags)


class Sharded(Alone):
    """DTensors, all split along one dimension over the ranks of one mesh dimension: an all-to-all each way."""

    def __init__(self, params: Sequence[DTensor], owners: Sequence[int], ranks: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._ranks, self._dtype, self._device = ranks, dtype, local(params[0]).device
        self._dim = sharded_along(params[0])[1]
        self._cuts = [_cuts(p.shape[self._dim], ranks.size()) for p in params]
        self._shapes = [p.shape for p in params]
        self._members = [[i for i, o in enumerate(owners) if o == r] for r in range(ranks.size())]

    def _shape(self, member: int, rank: int) -> torch.Size:
        """The shape of a rank's piece of a member."""
        shape = self._shapes[member]
        return torch.Size((*shape[: self._dim], self._cuts[member][rank], *shape[self._dim + 1 :]))

    def gather(self, momenta: Callable[[], list[Tensor | None]]) -> None:
        me, mine = self._ranks.rank(), self._members[self._ranks.rank()]
        sent = [sum(self._shape(i, me).numel() for i in members) for members in self._members]
        got = [sum(self._shape(i, r).numel() for i in mine) for r in range(self._ranks.size())]
        self._travelling = _AllToAll(torch.cat([m.reshape(-1) for m in momenta()]), sent, got, self._ranks)

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
        cut = [[None] * size if directions[i] is None else directions[i].reshape(self._shapes[i])
               .split(self._cuts[i], dim=self._dim) for i in mine]  # fmt: skip
        blocks = [
            _pack([pieces[r] for pieces in cut], [self._shape(i, r) for i in mine], self._dtype, self._device)
            for r in range(size)
        ]
        got = [sum(self._shape(i, me).numel() + 1 for i in members) for members in self._members]
        self._travelling = _AllToAll(torch.cat(blocks), [b.numel() for b in blocks], got, self._ranks)

    def receive(self) -> tuple[list[Tensor | None], Tensor | None]:
        directions, flags = [], []
        for members, block in zip(self._members, self._travelling.wait(), strict=True):
            pieces, moves = _unpack(block, [self._shape(i, self._ranks.rank()) for i in members])
            directions += pieces
            flags.append(moves)
        return directions, torch.cat(flags)


def _cuts(rows: int, ranks: int) -> list[int]:
    """How many rows each rank holds: DTensor cuts as torch.chunk does, and the last ranks may get nothing."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - r * chunk)) for r in range(ranks)]


def _pack(tensors: Sequence[Tensor | None], shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One flat tensor: the members, zeros for None, and then a 1 or 0 for each. Flags are filled in on the device."""
    flags = torch.ones(len(tensors), dtype=dtype, device=device)
    flat = [flags.new_zeros(s.numel()) if t is None else t.reshape(-1).to(dtype) for t, s in zip(tensors, shapes, strict=True)]
    for i, t in enumerate(tensors):
        if t is None:
            flags[i] = 0
    return torch.cat([*flat, flags])


def _unpack(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[list[Tensor], Tensor]:
    """The members and the flags of what `_pack` made."""
    *pieces, flags = flat.split([*(s.numel() for s in shapes), len(shapes)])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], flags


class _AllToAll:
    """An all-to-all under way, which keeps its input alive until it is waited for."""

    def __init__(self, flat: Tensor, sent: list[int], got: list[int], ranks: dist.ProcessGroup) -> None:
        self._input, self._got, self._output = flat, got, flat.new_empty(sum(got))
        self._work = dist.all_to_all_single(self._output, flat, got, sent, group=ranks, async_op=True)

    def wait(self) -> tuple[Tensor, ...]:
        """What each rank sent."""
        self._work.wait()
        blocks = self._output.split(self._got)
        self._input = self._output = None
        return blocks
