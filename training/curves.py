"""Reads the losses of a run: the lines of metrics.jsonl, and curves from them.

The runs of a study are packed into one file, one line of JSON per run. FILE.jsonl/NAME is the run NAME in such a file; it is
read like a run's folder.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError

AXES = {"update": "updates", "passes": "gradient evaluations", "tokens": "tokens", "seconds": "seconds"}
LOSSES = ("val_loss", "train_loss")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last line that was cut short is left out.

    Raises UserError if there is no such file, or if a line is malformed.
    """
    if (packed := _packed(run_dir)) is not None:
        return packed["metrics"]
    return read_records(run_dir / "metrics.jsonl")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file like metrics.jsonl: each has a number for every one of `AXES`, and numbers as losses.

    A loss may be NaN or infinite; the rest is finite. Raises UserError as `read_metrics` does.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run, such as runs/run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON; the file is damaged") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not an object; the file is damaged")
        if not all(_is_number(record.get(key)) and math.isfinite(record[key]) for key in AXES):
            raise UserError(f"{path}, line {number} has not all of {', '.join(AXES)} as numbers; the file is damaged")
        if wrong := [key for key in LOSSES if key in record and not _is_number(record[key])]:
            raise UserError(f"{path}, line {number} has a {wrong[0]} that is not a number; the file is damaged")
        records.append(record)
    return records


def read_packed(path: Path) -> list[dict[str, Any]]:
    """The runs in a packed file, one JSON object a line with `run` (its name), `config`, `environment` and `metrics`.

    A loss that was not finite is null in the file and NaN here. Raises UserError if there is no such file, or if a line is
    malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            run = json.loads(line)
            right = isinstance(run["run"], str) and all(isinstance(run[key], dict) for key in ("config", "environment"))
            for record in run["metrics"]:
                record |= {key: math.nan for key in LOSSES if key in record and record[key] is None}
                right = right and all(_is_number(record[key]) for key in (*AXES, *(k for k in LOSSES if k in record)))
        except (ValueError, KeyError, TypeError, RecursionError):
            right = False
        if not right:
            raise UserError(f"{path}, line {number} is not a packed run; the file is damaged")
        runs.append(run)
    return runs


def unpacked(paths: Iterable[Path]) -> list[Path]:
    """The paths of runs. A packed file stands for all of its runs."""
    return [run for path in paths for run in (_runs_of(path) if path.suffix == ".jsonl" and path.is_file() else [path])]


def _runs_of(path: Path) -> list[Path]:
    if not (runs := read_packed(path)):
        raise UserError(f"{path} is empty; leave it out")
    return [path / run["run"] for run in runs]


def _packed(run_dir: Path) -> dict[str, Any] | None:
    """The record of FILE.jsonl/NAME; None for a folder."""
    if run_dir.parent.suffix != ".jsonl" or not run_dir.parent.is_file():
        return None
    for run in read_packed(run_dir.parent):
        if run["run"] == run_dir.name:
            return run
    raise UserError(f"{run_dir.parent} has no run {run_dir.name}")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value) is not None
    except OverflowError:  # too large for a float
        return False


def curve(metrics: list[dict[str, Any]], loss: str = "val_loss") -> list[dict[str, Any]]:
    """The lines that have this loss, in the order of their updates. If an update occurs twice, the last line counts."""
    found = {record["update"]: record for record in metrics if loss in record}
    return [found[update] for update in sorted(found)]


def finite(metrics: list[dict[str, Any]], loss: str = "val_loss") -> list[dict[str, Any]]:
    """The curve without points whose loss is NaN or infinite."""
    return [record for record in curve(metrics, loss) if math.isfinite(record[loss])]


def run_name(run_dir: Path) -> str:
    """The run's name: the one in config.json, else the folder's. A packed run has its file's name in front of its own."""
    if _packed(run_dir) is not None:
        return f"{run_dir.parent.stem} {run_dir.name}"
    name = read_config(run_dir).get("run_name")
    return name if isinstance(name, str) and name.strip() else run_dir.resolve().name


def read_config(run_dir: Path) -> dict[str, Any]:
    """The options in a run's config.json, unchecked; empty if there are none to read."""
    if (packed := _packed(run_dir)) is not None:
        return packed["config"]
    try:
        config = json.loads((run_dir / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
