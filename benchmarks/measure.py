"""What the benchmarks share: a clock, rounds in which the contestants take turns, memory, the machine, the page."""

import itertools
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.machine import cpu_name

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
# Variables that hold the libraries to older instructions.
LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


class Clock:
    """Seconds of a call on the device, without what runs inside `paused()`.

    On a CPU with one thread these are CPU seconds of the process: others on a busy machine then count less.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pauses: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = self._now()
        yield
        self._pauses.append((start, self._now()))

    def time(self, function: Callable[[], Any]) -> tuple[float, float]:
        """(seconds of the function without the pauses in it, seconds of the pauses)."""
        self._pauses.clear()
        if self._cuda:
            torch.cuda.synchronize()
        start = self._now()
        function()
        end = self._now()
        if self._cuda:
            torch.cuda.synchronize()
        paused = sum(self._between(a, b) for a, b in self._pauses)
        return self._between(start, end) - paused, paused


def in_rounds(
    contestants: dict[str, Callable[[], Any]], rounds: int, budget: float, report: Callable[[str], None] = print
) -> dict[str, list[Any]]:
    """Each contestant once a round, another one first each time; fewer than `rounds` (3 at least) beyond `budget` seconds."""
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    names = list(contestants)
    begin = time.perf_counter()
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(contestants[name]())
        if i >= min(3, rounds) - 1 and time.perf_counter() - begin > budget:
            report(f"  stopped after {i + 1} of {rounds} rounds: {budget:.0f} s are over")
            break
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the ratios of each round: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that the call holds beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)
    return max(held)


def tensor_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all the storages in nested dicts and sequences."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(tensor_bytes(v, seen) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(v, seen) for v in value)
    return 0


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    info, flags = Path("/proc/cpuinfo"), ""
    if info.exists():
        flags = (re.search(r"flags\s*: (.*)", info.read_text()) or ["", ""])[1]
    return {
        "cpu": cpu_name(),
        "units": [u for u in UNITS if u in flags.split()],
        "held_to": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "logical_cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def describe(m: dict[str, Any]) -> str:
    """One paragraph about the machine."""
    device = f"{m['gpu']} (host: {m['cpu']})" if m["gpu"] else f"{m['cpu']} ({', '.join(m['units'])})"
    held = "".join(f", {name}={value}" for name, value in m["held_to"].items())
    load = f"{m['load_at_start']} at the start, {m.get('load_at_end', '?')} at the end"
    cpu_seconds = "; times are CPU seconds of the process" if not m["gpu"] and m["threads"] == 1 else ""
    return (
        f"{device}, {m['logical_cpus']} logical CPUs, {m['threads']} thread(s), torch {m['torch']}, "
        f"Python {m['python']}{held}. "
        f"Load average {load} (this process is 1 of it){cpu_seconds}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(s: dict[str, float]) -> list[str]:
    """Median, and the quartiles."""
    return [f"{s['median'] * 1e3:.4g}", f"{s['low'] * 1e3:.4g} to {s['high'] * 1e3:.4g}"]


def goals_table(goals: Sequence[dict[str, Any]]) -> str:
    """The goals that this run can decide, and what was measured."""
    rows = [
        [g["goal"], f"{g['measured']:.3g}", f"{g['sign']} {g['bound']:g}", "met" if met(g) else "**missed**"] for g in goals
    ]
    return table(["goal", "measured", "bound", ""], rows)


def met(goal: dict[str, Any]) -> bool:
    return goal["measured"] >= goal["bound"] if goal["sign"] == "≥" else goal["measured"] <= goal["bound"]


def write(folder: Path, name: str, page: str, data: dict[str, Any]) -> Path:
    """The page and its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    path = folder / f"{name}.md"
    path.write_text(page.rstrip() + "\n")
    return path
