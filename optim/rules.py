"""The types that the parts of an optimizer share, and which values its options allow."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

Closure = Callable[[], Any]
Group = dict[str, Any]
Buffers = dict[str, list[Tensor]]


class Rule(NamedTuple):
    """Which values an option allows."""

    allows: Callable[[Any], bool]
    allowed: str


def is_number(value: object) -> bool:
    """A real number, or a tensor of one; True and False are not numbers here."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


NON_NEGATIVE = Rule(lambda v: is_number(v) and 0 <= float(v) < math.inf, "a finite number ≥ 0")
POSITIVE = Rule(lambda v: is_number(v) and 0 < float(v) < math.inf, "a finite number > 0")
PAST = Rule(lambda v: is_number(v) and 0 <= float(v) < 1, "a number in [0, 1)")
SHARE = Rule(lambda v: is_number(v) and 0 < float(v) <= 1, "a number in (0, 1]")
PAIR = Rule(lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(map(PAST.allows, v)), "two numbers in [0, 1)")
SWITCH = Rule(lambda v: isinstance(v, bool), "True or False")
