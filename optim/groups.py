"""The parameter groups of a layer-wise optimizer: their options, the values that these allow, and what they mean."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adamw import AdamW
from .norms import VIEWS, Norm, get_norm
from .rules import NON_NEGATIVE, PAST, POSITIVE, SWITCH, Group, Rule


class LayerwiseGroups(Optimizer):
    """Parameter groups with a norm each.

    Besides its options a group has `updates`, whether an update is `pending`, and that update's step and decay, because a
    scheduler may change lr before it is applied.
    """

    _adamw: AdamW

    rules: ClassVar[dict[str, Rule]] = {
        "lr": NON_NEGATIVE, "momentum": PAST, "weight_decay": NON_NEGATIVE, "radius": POSITIVE, "bias_correction": SWITCH,
        "view": Rule(lambda v: v is None or v in VIEWS, f"None, {' or '.join(VIEWS)}"),
    }  # fmt: skip

    # What differs between momentum with an LMO and AdamW ---------------------------------------------------------------

    def averages(self, group: Group) -> dict[str, float]:
        """The averages of each parameter, and the weight of the past in each."""
        raise NotImplementedError

    def buffers(self, group: Group) -> list[str]:
        """The buffers of each parameter."""
        return list(self.averages(group))

    def _formulas(self, group: Group) -> Any:
        """Whose `averages`, `buffers`, `correction`, `fold`, `inputs` and `pending` a group follows."""
        return self._adamw if group["norm"] == "adamw" else self

    def _norm(self, group: Group, p: Tensor) -> Norm | None:
        """The norm of a parameter; None for AdamW."""
        if group["norm"] == "adamw":
            return None
        return get_norm(group["norm"], p.shape, group["scale"], group["polar"], group.get("ns_steps"), group["view"])

    # Groups ------------------------------------------------------------------------------------------------------------

    @classmethod
    def option_rules(cls) -> dict[str, Rule]:
        """The rules of the class and of those that it inherits from."""
        return {name: rule for c in reversed(cls.__mro__) for name, rule in vars(c).get("rules", {}).items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError for a value that an option does not allow, and for a parameter that is already here."""
        updates = self.param_groups[0]["updates"] if self.param_groups else 0
        if not isinstance(param_group["params"], Tensor | set):  # torch refuses a set
            param_group["params"] = list(param_group["params"])
        self._check_unique(param_group["params"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["norm"] == "adamw":
                for name, value in self._adamw.defaults.items():
                    group.setdefault(name, value)
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise
        group |= {"updates": updates, "pending": False, "pending_step": 0.0, "pending_decay": 0.0}
        group |= self._formulas(group).pending(group)

    def pending(self, group: Group) -> dict[str, Any]:
        """What else an update needs that is not applied yet."""
        return {}

    def _check_unique(self, params: Any) -> None:
        seen = {p for _, p in self._params()}
        for p in [params] if isinstance(params, Tensor) else params:
            p = p[1] if isinstance(p, tuple) else p  # (name, parameter)
            if isinstance(p, Tensor) and p in seen:
                raise ValueError(f"params must name every parameter once, got one of shape {tuple(p.shape)} twice")
            if isinstance(p, Tensor):
                seen.add(p)

    def _check_group(self, group: Group) -> None:
        adamw = self._adamw.rules if group["norm"] == "adamw" else {}
        for name, rule in (self.option_rules() | adamw).items():
            if not rule.allows(group[name]):
                raise ValueError(f"{name} must be {rule.allowed}, got {group[name]!r}")
        get_norm("rms", torch.Size(()), group["scale"], group["polar"])
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"params must be real floating-point tensors, got one of dtype {p.dtype}")
            self._norm(group, p)

    def _params(self) -> Iterator[tuple[Group, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p
