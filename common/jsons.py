"""JSON that every reader accepts: without infinity and NaN."""

import dataclasses
import math
from typing import Any


def jsonable(value: Any) -> Any:
    """`value` for `json.dumps`: dataclasses as dictionaries, tuples as lists, numbers that are not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
