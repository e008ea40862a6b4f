"""How one rank's share of a buffer looks in a state dict: a DTensor, so that torch's functions for checkpoints can join it."""

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

_COPIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.new_empty.default,
}


class SavedShare(DTensor):
    """What this rank keeps of a buffer of a replicated parameter, in the same memory.

    `owner`: the rank of the mesh that keeps the whole buffer; None if every rank keeps some rows. torch.distributed.checkpoint
    writes and reads every share once, and gathers the whole on request. A share is useless alone, so anything else than that,
    `torch.save` above all, raises RuntimeError: nothing can take it for the whole.
    """

    owner: int | None

    @classmethod
    def of(cls, kept: Tensor | None, owner: int | None, like: Tensor, dtype: torch.dtype, mesh: DeviceMesh) -> "SavedShare":
        """The share `kept` (None for nothing) of a buffer shaped `like` a parameter."""
        if kept is None:  # one number, seen as the whole or as no rows
            shape = like.shape if owner is not None else (0, *like.shape[1:])
            kept = torch.zeros((), dtype=dtype, device=like.device).expand(shape)
        placement = Replicate() if owner is not None else Shard(0)
        like_all = DTensor.from_local(kept, mesh, [placement], run_check=False, shape=like.shape, stride=like.stride())
        return cls._with(kept, like_all._spec, owner)

    @classmethod
    def _with(cls, kept: Tensor, spec: Any, owner: int | None) -> "SavedShare":
        share: Any = DTensor.__new__(cls, kept, spec, requires_grad=False)
        share.owner = owner
        return share

    @property
    def here(self) -> bool:
        """Whether this rank keeps its part of the buffer; false if another rank keeps all of it."""
        return self.owner is None or self.owner == self.device_mesh.get_local_rank()

    def to_local(self, **_: Any) -> Tensor:
        """This rank's part; if it keeps none of a whole, room for the whole, which torch fills when it loads."""
        return self._local_tensor if self.here else torch.empty_like(self._local_tensor, memory_format=torch.contiguous_format)

    def redistribute(self, *arguments: Any, **options: Any) -> DTensor:
        """The whole, on every rank. A collective."""
        if self.owner is None:
            whole = DTensor(self._local_tensor, self._spec, requires_grad=False).full_tensor()
        else:
            whole = self.to_local().contiguous()
            dist.broadcast(whole, group=self.device_mesh.get_group(), group_src=self.owner)
        return DTensor.from_local(whole, self.device_mesh, [Replicate()], run_check=False)

    def full_tensor(self, **_: Any) -> Tensor:
        """The whole, on every rank. A collective."""
        return self.redistribute().to_local()

    # torch.distributed.checkpoint asks for these.

    def __create_write_items__(self, name: str, value: Any) -> list[Any]:
        return super().__create_write_items__(name, value) if self.here else []

    def __create_chunk_list__(self) -> list[Any]:
        return super().__create_chunk_list__() if self.here else []

    # Whatever else would take the share for the whole.

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        share = args[0]
        if function in _COPIES and isinstance(share, cls):
            return cls._with(function(share._local_tensor, *args[1:], **(kwargs or {})), share._spec, share.owner)
        _refuse()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SavedShare":
        copied: Any = self.clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise RuntimeError(
        "this state_dict holds one rank's share of the momentum, which is useless alone: call full_state_dict() on every rank "
        "and save what it returns, or use torch.distributed.checkpoint"
    )
