"""Reads runs: their options, environments and metrics, from their folders or from packed files.

The runs of a study are packed: one file per arm, one line of JSON per run. Every reader takes a folder and a packed file alike.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from common.jsons import jsonable

AXES = {"update": "updates", "passes": "gradient evaluations", "tokens": "tokens", "seconds": "seconds"}
LOSSES = ("val_loss", "train_loss")


@dataclass(frozen=True)
class Run:
    """One run.

    `path` is its folder, or the packed file that holds it. `config` has its options as they were saved, unchecked, and
    `environment` describes its last launch; both may be empty. `metrics` are the lines of its metrics.jsonl: each has a number
    for every one of `AXES`, and numbers as losses. `diverged` says how the run diverged; None if it did not.
    """

    name: str
    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    diverged: str | None = None
    packed: bool = False

    @property
    def label(self) -> str:
        """The name for readers. A packed run's has its file's in front, since seeds have the same names in every file."""
        return f"{self.path.stem} {self.name}" if self.packed else self.name

    @property
    def source(self) -> str:
        """Where the metrics are, for messages."""
        return f"{self.path}, {self.name}" if self.packed else str(self.path / "metrics.jsonl")

    def curve(self, loss: str = "val_loss") -> list[dict[str, Any]]:
        """The lines that have this loss, in the order of their updates. If an update occurs twice, the last line counts."""
        found = {line["update"]: line for line in self.metrics if loss in line}
        return [found[update] for update in sorted(found)]

    def finite(self, loss: str = "val_loss") -> list[dict[str, Any]]:
        """The curve without points whose loss is NaN or infinite."""
        return [line for line in self.curve(loss) if math.isfinite(line[loss])]


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs at these paths: folders, and packed files, which stand for all of their runs. Raises UserError as below."""
    return [
        run for path in paths for run in (_all_of(path) if path.suffix == ".jsonl" and path.is_file() else [read_run(path)])
    ]


def _all_of(path: Path) -> Iterable[Run]:
    if not (runs := read_packed(path)):
        raise UserError(f"{path} is empty; leave it out")
    return runs.values()


# A run's folder -------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """The run in a folder. Its name is the one in config.json, else the folder's.

    Raises UserError if there is no metrics.jsonl, or if a line of it is malformed. A last line that was cut short is left out.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    config = _read_json(folder / "config.json", dict) or {}
    launches = _read_json(folder / "environment.json", list) or [{}]
    diverged = folder / "diverged.txt"
    name = config.get("run_name")
    return Run(
        name if isinstance(name, str) and name.strip() else folder.resolve().name,
        folder,
        config,
        launches[-1] if isinstance(launches[-1], dict) else {},
        metrics,
        diverged.read_text(encoding="utf-8").strip() if diverged.exists() else None,
    )


def _read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds if it is of this kind; None if not, or if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; see `read_run`. A loss may be NaN or infinite; the rest is finite."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run, such as runs/run") from None
    metrics = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON; the file is damaged") from None
        if not isinstance(line, dict):
            raise UserError(f"{path}, line {number} is not an object; the file is damaged")
        if not all(_is_number(line.get(key)) and math.isfinite(line[key]) for key in AXES):
            raise UserError(f"{path}, line {number} has not all of {', '.join(AXES)} as numbers; the file is damaged")
        if wrong := [key for key in LOSSES if key in line and not _is_number(line[key])]:
            raise UserError(f"{path}, line {number} has a {wrong[0]} that is not a number; the file is damaged")
        metrics.append(line)
    return metrics


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value) is not None
    except OverflowError:  # too large for a float
        return False


# Packed files ---------------------------------------------------------------------------------------------------------

_held: dict[Path, tuple[tuple[int, ...], dict[str, Run]]] = {}  # the packed files that were read, and their state then


def read_packed(path: Path) -> Mapping[str, Run]:
    """The runs in a packed file, by name. A file is read again only if it has changed.

    Each line is an object with `run` (its name), `config`, `environment`, `metrics`, and `diverged` if it did. A loss that was
    not finite is null in the file and NaN here. Raises UserError if there is no such file, or if a line is malformed.
    """
    try:
        status = path.stat()
        state = status.st_ino, status.st_mtime_ns, status.st_size
        if path not in _held or _held[path][0] != state:
            _held[path] = state, _parsed(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return _held[path][1]


def _parsed(path: Path, text: str) -> dict[str, Run]:
    runs = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            held = json.loads(line)
            run = Run(
                held["run"], path, held["config"], held["environment"], held["metrics"], held.get("diverged"), packed=True
            )
            right = isinstance(run.name, str) and all(isinstance(part, dict) for part in (run.config, run.environment))
            for point in run.metrics:
                point |= {key: math.nan for key in LOSSES if key in point and point[key] is None}
                right = right and all(_is_number(point[key]) for key in (*AXES, *(k for k in LOSSES if k in point)))
        except (ValueError, KeyError, TypeError, RecursionError):
            right = False
        if not right:
            raise UserError(f"{path}, line {number} is not a packed run; the file is damaged")
        runs[run.name] = run
    return runs


def write_packed(path: Path, runs: Iterable[Run]) -> None:
    """Write a packed file, the runs in the order of their names."""
    lines = []
    for run in sorted(runs, key=lambda run: run.name):
        held = {"run": run.name, "config": run.config, "environment": run.environment, "metrics": run.metrics}
        held |= {} if run.diverged is None else {"diverged": run.diverged}
        lines.append(json.dumps(jsonable(held), ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
