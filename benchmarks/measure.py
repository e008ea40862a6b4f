"""Shared by the benchmarks: a clock, rounds in which the contestants take turns, the machine, the page and its numbers."""

import json
import os
import platform
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import Parser, positive
from common.files import write_text
from common.machine import cpu_name
from common.tables import markdown
from optim.polar import has_bfloat16_units
from training.devices import choose_device

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


class Clock:
    """Seconds of a call on the device, split into those inside and outside `inside()`.

    On a CPU with one thread these are CPU seconds of the process, which other work on the machine disturbs less.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._inside = 0.0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()

    @contextmanager
    def inside(self) -> Iterator[None]:
        start = self._now()
        yield
        self._inside += self._now() - start

    def time(self, function: Callable[[], Any]) -> tuple[float, float]:
        """(seconds of the function outside of `inside()`, seconds inside)."""
        self._inside = 0.0
        start = self._now()
        function()
        return self._now() - start - self._inside, self._inside


def in_rounds(contestants: dict[str, Callable[[], Any]], rounds: int, budget: float) -> dict[str, list[Any]]:
    """Run each contestant once per round, each round starting with another one. Returns the results by contestant.

    Stops early, after at least 3 rounds, if `budget` seconds are over.
    """
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    names = list(contestants)
    begin = time.perf_counter()
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(contestants[name]())
        if i >= min(3, rounds) - 1 and time.perf_counter() - begin > budget:
            print(f"  stopped after {i + 1} of {rounds} rounds: {budget:.0f} s are over", flush=True)
            break
    return results


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """The median and the quartiles, as text."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return [f"{median * 1e3:.4g}", f"{low * 1e3:.4g} to {high * 1e3:.4g}"]


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median over the rounds of the ratio, so that whatever slows down a full round cancels."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def goal(name: str, measured: float, bound: float) -> list[str]:
    """A row of the table of goals."""
    return [name, f"{measured:.3g}", f"≤ {bound:g}", "met" if measured <= bound else "**missed**"]


def goals_table(goals: Sequence[Sequence[str]]) -> str:
    return markdown([["goal", "measured", "bound", ""], *goals]) if goals else ""


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bfloat16_units": has_bfloat16_units(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def describe(m: dict[str, Any]) -> str:
    """The machine, in one paragraph."""
    device = f"{m['gpu']}, host {m['cpu']}" if m["gpu"] else m["cpu"]
    units = "with" if m["bfloat16_units"] else "without"
    cpu_seconds = " Times are CPU seconds of the process." if not m["gpu"] and m["threads"] == 1 else ""
    return (
        f"{device}, {units} bfloat16 units, {m['logical_cpus']} logical CPUs, {m['threads']} thread(s), "
        f"torch {m['torch']}, Python {m['python']}. Load average {m['load_at_start']} at the start, {m['load_at_end']} at the "
        f"end (this process is 1 of it).{cpu_seconds}"
    )


def wrapped(text: str) -> str:
    """The page with its paragraphs wrapped at 100 characters. Headings and tables stay."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith(("#", "|")) else textwrap.fill(p, 100, break_on_hyphens=False) for p in paragraphs)


def main(
    argv: Sequence[str] | None,
    name: str,
    sets: dict[str, Callable[[torch.device, int, float], tuple[str, Any]]],
    default: dict[str, str],
    intro: str,
) -> None:
    """The command line of a benchmark: runs its sets and writes `NAME_DEVICE.md` and `.json`.

    A set takes (device, rounds, seconds) and returns its part of the page and its numbers. `default` names the sets of a
    device, separated by commas; --quick runs the set `tiny`. `intro` has a placeholder {machine}.
    """
    parser = Parser(description=intro.splitlines()[0].lstrip("# "))
    parser.add_argument("--device", choices=tuple(default), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", default="", help="comma-separated: " + ", ".join(sets))
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=40, help="the most rounds to run")
    parser.add_argument("--budget", type=float, default=120, help="seconds for the rounds of a set; at least three rounds run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a tiny set: does the script run?")
    args = parser.parse_args(argv)
    chosen = "tiny" if args.quick else args.sets or default[args.device]
    if unknown := set(chosen.split(",")) - sets.keys():
        parser.error(f"unknown sets: {', '.join(sorted(unknown))}")
    device = choose_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    host, parts, numbers = machine(device), [], {}
    for each in chosen.split(","):
        print(each, flush=True)
        part, numbers[each] = sets[each](device, 3 if args.quick else args.rounds, args.budget)
        parts.append(f"## {each}\n\n{part}")
    host["load_at_end"] = round(os.getloadavg()[0], 2)
    page = wrapped("\n\n".join([intro.format(machine=describe(host)).rstrip(), *(part.rstrip() for part in parts)])) + "\n"
    path = args.out / f"{name}_{device.type}.md"
    write_text(path, page)
    data = json.dumps({"machine": host, "sets": numbers}, indent=1, ensure_ascii=False)
    write_text(path.with_suffix(".json"), data + "\n")
    print(page)
    print(f"written to {path}")
