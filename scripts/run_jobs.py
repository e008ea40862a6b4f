"""Runs of train_gpt.py as subprocesses: started, resumed, skipped where they are done, a few at a time."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GOES_ON = "stopped; the same command goes on from here"

# What may change on the way without making another run of it.
_FREE = {"steps", "val_every", "log_every", "checkpoint_every", "keep_checkpoints", "data_dir", "device"}


@dataclass(frozen=True)
class Job:
    """One run: its folder, its config file and the options that differ from it."""

    folder: Path
    config: str
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()  # before train_gpt.py, else this Python

    @property
    def command(self) -> list[str]:
        """The command, with paths relative to the repository where they lie in it."""
        options = {
            "results-dir": _relative(self.folder.parent),
            "run-name": self.folder.name,
            **{name.replace("_", "-"): value for name, value in self.options.items()},
        }
        words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
        return [*(self.launcher or (sys.executable,)), "train_gpt.py", f"--config={self.config}", "--resume=auto", *words]

    def changed(self) -> str:
        """Which setting this run was started with that is another one now, in words; empty where none is."""
        try:
            saved = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            return ""
        for name in sorted(self.options.keys() & saved.keys() - _FREE):
            kind, wanted = type(saved[name]), self.options[name]
            wanted = str(wanted).lower() == "true" if kind is bool else kind(wanted)
            if wanted != saved[name]:
                return f"{_relative(self.folder)} was run with {name} = {saved[name]}, not {wanted}; remove it to run it again"
        return ""

    def state(self) -> str:
        """`done`, `diverged`, `begun` or `new`."""
        if (self.folder / "diverged.txt").exists():
            return "diverged"
        curve = validations(self.folder)
        if curve and max(curve) >= int(self.options["steps"]):
            return "done"
        return "begun" if curve else "new"


def _relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def validations(folder: Path) -> dict[int, float]:
    """Update and validation loss of a run so far, those from before an extension too."""
    lines = records(folder / "before.jsonl") + records(folder / "metrics.jsonl")
    return {record["update"]: record["val_loss"] for record in lines if "val_loss" in record}


def records(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line that was cut short is left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is not JSON; the file is damaged") from None
    return found


def _keep_validations(folder: Path) -> None:
    """Write down the validations: a run that goes on from its end loses the one at that update."""
    if found := validations(folder):
        lines = [json.dumps({"update": update, "val_loss": loss}) for update, loss in sorted(found.items())]
        (folder / "before.jsonl").write_text("\n".join(lines) + "\n")


def run_all(jobs: list[Job], at_once: int) -> None:
    """Run what is not done yet, `at_once` at a time, in the order given. Interrupted, it stops the runs and can be
    started again. A loss that is no longer finite ends a run as `diverged`; any other failure ends everything."""
    if wrong := next(filter(None, (job.changed() for job in jobs)), ""):
        raise UserError(wrong)
    waiting = [job for job in jobs if job.state() not in ("done", "diverged")]
    print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} done, {len(waiting)} to run", flush=True)
    running: set[subprocess.Popen] = set()
    failed = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs are stopped too

    def work(job: Job) -> None:
        if failed.is_set():
            return
        started = time.monotonic()
        _keep_validations(job.folder)
        process = subprocess.Popen(
            job.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment()
        )
        running.add(process)
        try:
            _, errors = process.communicate()
        finally:
            running.discard(process)
        if failed.is_set():
            return
        lines = errors.strip().splitlines()
        last = lines[-1] if lines else "no message"
        if process.returncode and _diverged(last):
            (job.folder / "diverged.txt").write_text(last.removeprefix("train_gpt: ") + "\n")
        elif process.returncode:
            failed.set()
            raise UserError(f"{_relative(job.folder)} failed: {last}")
        curve = validations(job.folder)
        loss = f"{curve[max(curve)]:.4f}" if curve and job.state() == "done" else job.state()
        print(f"  {_relative(job.folder)}   {loss}   {time.monotonic() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(max_workers=at_once) as pool:
        try:
            for future in [pool.submit(work, job) for job in waiting]:
                future.result()
        except BaseException:
            failed.set()
            for process in list(running):
                process.terminate()  # train_gpt.py writes a checkpoint first
            raise


def _diverged(message: str) -> bool:
    return message.startswith("train_gpt: ") and any(word in message for word in (" is nan", " is inf", "not finite"))


def _environment() -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**os.environ, "OMP_NUM_THREADS": threads}


def final_loss(job: Job) -> float:
    """The last validation loss of a run that is done; infinite where it diverged; nan where it is not done."""
    state = job.state()
    if state != "done":
        return math.inf if state == "diverged" else math.nan
    return validations(job.folder)[int(job.options["steps"])]
