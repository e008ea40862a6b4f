"""Who computes the LMO of which parameter, and how the others get it.

Every parameter has one owner. Where the model is replicated (DDP), the owner alone keeps the momentum, computes the
direction and broadcasts it; every rank then applies the same update to its own weights, which so stay bit-identical.
Where parameters are sharded (FSDP2: DTensor), momentum is sharded like the parameter; an all-to-all brings the pieces of
a matrix to its owner and another one takes the pieces of the direction back. Communication follows the parameter groups
and never what one rank found in `.grad`, so that a gradient that is None somewhere makes nobody wait.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """What of this tensor lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Ownership:
    """Gives every parameter an owner: the rank with the least work so far, dearest parameters of a group first."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}
        self._load: dict[object, list[float]] = {}

    def __getitem__(self, param: Tensor) -> int:
        return self._owner[param]

    def assign(self, params: Sequence[Tensor], matrix: bool, ranks: int, key: object) -> None:
        """Assign owners among `ranks`; `key` names the set of ranks. `matrix`: the LMO costs a matrix product."""

        def cost(p: Tensor) -> float:
            return float(p.numel()) * (min(p.shape[0], math.prod(p.shape[1:])) if matrix else 1)

        load = self._load.setdefault(key, [0.0] * ranks)
        for p in sorted(params, key=cost, reverse=True):
            owner = load.index(min(load))
            self._owner[p] = owner
            load[owner] += cost(p)


class Alone:
    """One process, or a computation that needs nothing but this rank's own piece."""

    rank, size = 0, 1

    def collect(self, momenta: list[Tensor | None], owners: list[int]) -> list[Tensor | None]:
        return momenta

    def spread(self, directions: list[Tensor | None], owners: list[int], like: list[Tensor], dtype: torch.dtype) -> None:
        self._result = directions

    def wait(self) -> list[Tensor | None]:
        """The direction of every member that moves, None for the others."""
        return self._result


class Replicated(Alone):
    """The same parameters on every rank of a process group; each matrix's momentum lies on its owner."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()

    def spread(self, directions: list[Tensor | None], owners: list[int], like: list[Tensor], dtype: torch.dtype) -> None:
        """Start one broadcast per owner; `_buffers` keeps the inputs alive until `wait`."""
        self._result, self._pending = list(directions), []
        for owner in sorted(set(owners)):
            members = [i for i, o in enumerate(owners) if o == owner]
            if owner == self.rank:
                flat = torch.cat(
                    [
                        torch.zeros(like[i].numel(), dtype=dtype, device=like[i].device)
                        if directions[i] is None
                        else directions[i].reshape(-1).to(dtype)
                        for i in members
                    ]
                )
            else:
                flat = torch.empty(sum(like[i].numel() for i in members), dtype=dtype, device=like[0].device)
            source = dist.get_global_rank(self._group, owner)
            work = dist.broadcast(flat, source, group=self._group, async_op=True)
            self._pending.append((work, flat, members))
        self._like = like

    def wait(self) -> list[Tensor | None]:
        for work, flat, members in self._pending:
            work.wait()
            pieces = flat.split([self._like[i].numel() for i in members])
            for i, piece in zip(members, pieces, strict=True):
                self._result[i] = piece.view(self._like[i].shape)
        self._pending = []
        return self._result


class Sharded(Alone):
    """DTensors, split along one dimension over the ranks of a mesh dimension."""

    def __init__(self, param: DTensor) -> None:
        mesh_dim, shard = next((i, s) for i, s in enumerate(param.placements) if isinstance(s, Shard))
        self._group = param.device_mesh.get_group(mesh_dim)
        self._dim, self.rank, self.size = shard.dim, self._group.rank(), self._group.size()

    def _sizes(self, shape: torch.Size) -> list[torch.Size]:
        """The shape of every rank's piece (DTensor cuts like torch.chunk; a rank may get nothing)."""
        rows = shape[self._dim]
        chunk = -(-rows // self.size)
        cuts = [max(0, min(chunk, rows - r * chunk)) for r in range(self.size)]
        return [torch.Size((*shape[: self._dim], c, *shape[self._dim + 1 :])) for c in cuts]

    def collect(self, momenta: list[Tensor | None], owners: list[int]) -> list[Tensor | None]:
        """Whole matrices for the members that this rank owns, None for the others."""
        self._shapes = [m.shape for m in momenta]
        pieces = [self._sizes(shape) for shape in self._shapes]
        mine = [i for i, o in enumerate(owners) if o == self.rank]
        send = [local(m).reshape(-1) for m in _by_owner(momenta, owners)]
        sent = [sum(pieces[i][self.rank].numel() for i, o in enumerate(owners) if o == r) for r in range(self.size)]
        got = [sum(pieces[i][r].numel() for i in mine) for r in range(self.size)]
        self._sent, self._got, self._pieces = sent, got, pieces
        received = _all_to_all(torch.cat(send), sent, got, self._group)
        received.wait()
        whole: list[Tensor | None] = [None] * len(momenta)
        parts: dict[int, list[Tensor]] = {i: [] for i in mine}
        for r, block in enumerate(received.tensor.split(got)):
            for i, piece in zip(mine, block.split([pieces[i][r].numel() for i in mine]), strict=True):
                parts[i].append(piece.view(pieces[i][r]))
        for i in mine:
            whole[i] = torch.cat(parts[i], dim=self._dim)
        return whole

    def spread(self, directions: list[Tensor | None], owners: list[int], like: list[Tensor], dtype: torch.dtype) -> None:
        mine = [i for i, o in enumerate(owners) if o == self.rank]
        cut = {
            i: (torch.zeros(self._shapes[i], dtype=dtype, device=local(like[i]).device) if directions[i] is None
                else directions[i].to(dtype)).split([s[self._dim] for s in self._pieces[i]], dim=self._dim)
            for i in mine
        }  # fmt: skip
        send = [cut[i][r].reshape(-1) for r in range(self.size) for i in mine]
        flat = torch.cat(send) if send else torch.empty(0, dtype=dtype, device=local(like[0]).device)
        self._owners = owners
        self._received = _all_to_all(flat, self._got, self._sent, self._group)

    def wait(self) -> list[Tensor | None]:
        self._received.wait()
        result: list[Tensor | None] = [None] * len(self._owners)
        order = [i for r in range(self.size) for i, o in enumerate(self._owners) if o == r]
        shapes = [self._pieces[i][self.rank] for i in order]
        for i, shape, piece in zip(order, shapes, self._received.tensor.split([s.numel() for s in shapes]), strict=True):
            result[i] = piece.view(shape)
        self._received = None
        return result


def _by_owner(items: list[Tensor], owners: list[int]) -> list[Tensor]:
    return [item for _, item in sorted(zip(owners, items, strict=True), key=lambda pair: pair[0])]


class _all_to_all:
    """An all-to-all under way; holds its input and output until `wait`."""

    def __init__(self, flat: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> None:
        self._input = flat
        self.tensor = flat.new_empty(sum(got))
        self._work = dist.all_to_all_single(self.tensor, flat, got, sent, group=group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        self._input = None
