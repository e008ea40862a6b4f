"""What a layer-wise optimizer remembers of each parameter: buffers and counters, who owns which, state dicts."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .adamw import AdamW
from .buckets import split
from .groups import LayerwiseGroups
from .rules import Buffers, Group
from .saved import SavedShare
from .shares import Shares, local, sharded_along


class LayerwiseState(LayerwiseGroups):
    """For every parameter its buffers and counters.

    The state of a parameter: its buffers (as far as this rank owns them), `steps` (gradients taken), `pending` (whether the
    pending update moves it), and for every average the sum of its weights, for the bias correction.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], adamw: AdamW, process_group: dist.ProcessGroup | None
    ) -> None:
        self._adamw = adamw
        self._set_up(process_group)
        super().__init__(params, defaults)

    def _set_up(self, process_group: dist.ProcessGroup | None) -> None:
        """The part of the state that neither a pickle nor a state dict holds."""
        self._shares = Shares(process_group)
        self._loading: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    # Buffers -----------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for a value that an option does not allow, and for a parameter that is already here."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._admit(group, group["params"])

    def _admit(self, group: Group, params: list[Tensor]) -> None:
        """Give new parameters their owners and their state."""
        self._assign_owners(group, params)
        for p in params:
            self.state[p] = self._fresh_scalars(group)
            if self._shares.owns(p):
                self.state[p] |= {name: self._shares.new_buffer(p) for name in self._formulas(group).buffers(group)}

    def _admit_replaced(self) -> None:
        """Frameworks replace the parameters of a group (FSDP2 by DTensors): admit the new ones, forget the old ones."""
        present = {p for _, p in self._params()}
        for p in [key for key in self.state if isinstance(key, Tensor) and key not in present]:
            del self.state[p]
            self._shares.forget(p)
        for group in self.param_groups:
            if new := [p for p in group["params"] if "steps" not in self.state.get(p, {})]:
                self._check_group(group)
                self._admit(group, new)

    def _fresh_scalars(self, group: Group) -> dict[str, Any]:
        averages = self._formulas(group).averages(group)
        return {"steps": 0, "pending": False, **{f"{name}_weight": 0.0 for name in averages}}

    def _buffers(self, group: Group, params: list[Tensor]) -> Buffers:
        """This rank's parts of the buffers of parameters that it owns."""
        return {name: [local(self.state[p][name]) for p in params] for name in self._formulas(group).buffers(group)}

    # Who owns what -----------------------------------------------------------------------------------------------------

    def _split(self, group: Group, params: list[Tensor]) -> Iterator[list[Tensor]]:
        alone = all(self._ranks_of(group, p) is None for p in params)
        return split(params, lambda p: self._norm(group, p), alone)

    def _ranks_of(self, group: Group, p: Tensor) -> dist.ProcessGroup | None:
        """The ranks that share the work of p's direction; None if this rank needs no other."""
        if not isinstance(p, DTensor):
            return self._shares.ranks
        norm = self._norm(group, p)
        if norm is None or norm.entrywise:
            return None
        along = sharded_along(p)
        if along is None or norm.separable(p.shape, along[1]):
            return None
        return p.device_mesh.get_group(along[0])

    def _assign_owners(self, group: Group, params: list[Tensor]) -> None:
        for members in self._split(group, params):
            ranks = self._ranks_of(group, members[0])
            if ranks is not None:
                norms = [self._norm(group, p) for p in members]
                by_rows = all(n is None or n.separable(p.shape, 0) for n, p in zip(norms, members, strict=True))
                self._shares.assign(members, ranks, by_rows)

    # Pickles and state dicts -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_shares"):  # unpickled or copied: process groups do not travel
            self._set_up(None)
            for group in self.param_groups:
                self._assign_owners(group, group["params"])
        if self._loading:
            self._take_loaded()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. If ranks share the parameters (DDP), each buffer is a DTensor of this rank's share, in the same memory.

        torch.distributed.checkpoint joins the shares, and so does `full_state_dict`. To pickle a share raises RuntimeError.
        Does not communicate.
        """
        self._admit_replaced()
        state = super().state_dict()
        for i, (group, p) in enumerate(self._params()):
            names = self._formulas(group).buffers(group)
            scalars = {k: v for k, v in state["state"][i].items() if k not in names}
            state["state"][i] = scalars | {n: self._shares.saved(p, self.state[p].get(n)) for n in names}
        return state

    def full_state_dict(self) -> dict[str, Any]:
        """The `state_dict` of the whole model, on every rank. A collective of the ranks that share the parameters."""
        full = self.state_dict()
        for i, values in full["state"].items():
            full["state"][i] = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}
        return full

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but buffers keep their own dtype and storage, and take what this rank owns of a whole state.

        Options that a group lacks stay as they are. Raises ValueError if a buffer that this rank owns is missing or has another
        shape, as in the state_dict of one rank of several (see `full_state_dict`).
        """
        before: Any = LayerwiseState._before_loading
        handle = self.register_load_state_dict_pre_hook(before)  # after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = []

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Check what is to be loaded, and keep its tensors away from torch, which would cast them to the parameter's dtype."""
        self._admit_replaced()
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return None  # torch's own message is better
        if not all(isinstance(group.get("pending", False), bool) for group in groups):
            raise ValueError("the state_dict was saved by an older version, whose pending update is not known here")
        loading = []
        for i, (group, p) in zip((i for g in groups for i in g["params"]), self._params(), strict=True):
            saved = dict(state_dict["state"].get(i, {}))
            names = self._formulas(group).buffers(group) if self._shares.owns(p) else []
            buffers = {name: self.state[p][name] for name in names}
            for name, own in buffers.items():
                _check_buffer(name, p, own, saved.get(name))
            loading.append((saved, buffers))
        self._loading = loading
        # Options that a foreign or older group lacks keep their present values.
        filled = [
            {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, "pending": False, **group}
            for own, group in zip(self.param_groups, groups, strict=True)
        ]
        return {**state_dict, "state": {}, "param_groups": filled}

    @torch.no_grad()
    def _take_loaded(self) -> None:
        """Copy the loaded state into the existing buffers."""
        for (group, p), (values, buffers) in zip(self._params(), self._loading, strict=True):
            formulas, scalars = self._formulas(group), self._fresh_scalars(group)
            if "steps" not in values:  # another optimizer's momentum counts as a full average
                scalars |= {"steps": 1, **{f"{name}_weight": 1.0 for name in formulas.averages(group)}}
            others = {
                k: v.to(p.device) if isinstance(v, Tensor) and v.ndim else v
                for k, v in values.items()
                if k not in formulas.buffers(group)
            }
            self.state[p] = scalars | others | buffers
            for name, buffer in buffers.items():
                self._shares.copy(p, buffer, values[name])


def _check_buffer(name: str, p: Tensor, own: Tensor, value: object) -> None:
    """Raise ValueError unless this saved value can fill a buffer of p of which this rank has `own`."""
    share = isinstance(value, DTensor) and not isinstance(own, DTensor)  # of this rank, as `state_dict` gives it
    absent = isinstance(value, SavedShare) and not value.here
    if not isinstance(value, Tensor) or absent or (share and local(value).shape != own.shape):
        raise ValueError(
            f"the state_dict has no {name} for a parameter of shape {tuple(p.shape)}: it is another optimizer's, or one rank's "
            "share; save full_state_dict() or use torch.distributed.checkpoint"
        )
    if value.shape != p.shape:
        raise ValueError(f"the state_dict has a {name} of shape {tuple(value.shape)} for a parameter of shape {tuple(p.shape)}")
