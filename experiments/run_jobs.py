"""Starts or resumes runs of train_gpt.py, a few at a time and each in its own process, and packs their records.

A run writes to runs/, which is not kept. Its measurements are packed: one file per arm of a study, one line of JSON per run,
with the run's name, config, environment and metrics. A packed run counts as done, so a study can continue without runs/.
"""

import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from common.jsons import jsonable
from training.curves import curve, read_config, read_metrics, read_packed

ROOT = Path(__file__).resolve().parent.parent
GOES_ON = "stopped; the same command goes on from here"

# Options that may change without making it another run.
_FREE = {"steps", "val_every", "log_every", "checkpoint_every", "keep_checkpoints", "data_dir", "device"}
_ENVIRONMENT = ("time", "platform", "device", "cores", "threads", "python", "torch", "cuda", "revision")

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: its folder, the file that holds its packed record, its config file, and the options that override it."""

    folder: Path
    packed: Path
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()  # before train_gpt.py; default: this Python

    @property
    def steps(self) -> int:
        return int(self.options["steps"])

    @property
    def command(self) -> list[str]:
        """The command, with paths inside the repository relative to it."""
        options = {
            "results_dir": relative(self.folder.parent),
            "run_name": self.folder.name,
            **self.options,
        }
        first = [*(self.launcher or (sys.executable,)), "train_gpt.py", f"--config={self.config}", "--resume=auto"]
        return [*first, *words_of(options)]

    @property
    def line(self) -> str:
        """The command as typed in a shell."""
        return f"python {shlex.join(self.command[1:])}"

    def record(self) -> Record | None:
        """The packed record of this run or the folder's, whichever is further on; None if there is neither."""
        packed, here = packed_records(self.packed).get(self.folder.name), self._of_folder()
        return max((r for r in (packed, here) if r is not None), key=_reached, default=None)

    def _of_folder(self) -> Record | None:
        if not (self.folder / "metrics.jsonl").exists():
            return None
        record = {
            "run": self.folder.name,
            "config": read_config(self.folder),
            "environment": _environment_of(self.folder),
            "metrics": read_metrics(self.folder),
        }
        diverged = self.folder / "diverged.txt"
        return record | ({"diverged": diverged.read_text().strip()} if diverged.exists() else {})

    def changed(self) -> str:
        """A message that names a setting that differs from the one this run was started with; empty if there is none."""
        saved = (self.record() or {}).get("config", {})
        for name in sorted(self.options.keys() & saved.keys() - _FREE):
            if not _same(saved[name], self.options[name]):
                was, now = saved[name], self.options[name]
                return f"{relative(self.folder)} was run with {name} = {was}, not {now}; remove its record to run it again"
        return ""

    def state(self) -> str:
        """`done`, `diverged`, `begun` or `new`."""
        record = self.record()
        if record is None:
            return "new"
        if "diverged" in record:
            return "diverged"
        return "begun" if math.isnan(self._loss_in(record, self.steps)) else "done"

    def loss_at(self, update: int) -> float:
        """The validation loss at an update; infinite if the run diverged, nan if it is not that far yet.

        Raises UserError if the run went past the update without a validation.
        """
        record = self.record()
        return math.nan if record is None else self._loss_in(record, update)

    def _loss_in(self, record: Record, update: int) -> float:
        found = {point["update"]: point["val_loss"] for point in curve(record["metrics"])}
        if update in found:
            return found[update] if math.isfinite(found[update]) else math.inf
        if "diverged" in record:
            return math.inf
        if _reached(record) > update:
            raise UserError(f"{relative(self.folder)} was not validated at update {update}; choose other --steps")
        return math.nan

    def finished(self) -> bool:
        return self.state() in ("done", "diverged")


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options of train_gpt.py as words of its command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]


def _same(saved: object, wanted: object) -> bool:
    """Whether an option equals the saved one. Options from a command line are text."""
    if isinstance(saved, bool):
        return str(saved).lower() == str(wanted).lower()
    if isinstance(saved, int | float):
        return float(saved) == float(wanted)
    if isinstance(saved, dict):
        return saved == wanted
    return str(saved) == str(wanted)


def relative(path: Path) -> str:
    """The path as text, relative to the repository if it is inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def packed_records(path: Path) -> dict[str, Record]:
    """The records in a packed file, by the name of the run; empty if there is no such file."""
    return {record["run"]: record for record in read_packed(path)} if path.exists() else {}


def pack(jobs: Iterable[Job]) -> None:
    """Write the records of finished runs into their packed files. Other runs in the files stay."""
    files: dict[Path, list[Job]] = {}
    for job in jobs:
        files.setdefault(job.packed, []).append(job)
    for path, members in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)  # before the first run, in case it fails
        before = packed_records(path)
        after = before | {job.folder.name: job.record() for job in members if job.finished()}
        if after == before:
            continue
        lines = [json.dumps(jsonable(record), ensure_ascii=False) + "\n" for _, record in sorted(after.items())]
        write_text(path, "".join(lines))


def run_all(jobs: list[Job], at_once: int) -> None:
    """Run the jobs that are not finished, `at_once` at a time, in the order given, and pack each when it is.

    An interruption stops the runs; the next call resumes them. A loss that is not finite ends a run as `diverged`. Any other
    failure stops all runs and raises a UserError.
    """
    if wrong := next(filter(None, (job.changed() for job in jobs)), ""):
        raise UserError(wrong)
    waiting = [job for job in jobs if not job.finished()]
    print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} done, {len(waiting)} to run", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["train_gpt", "torch._dynamo"])  # importing them takes as long as 100 updates
    running: set[multiprocessing.process.BaseProcess] = set()
    failed, packing, starting = threading.Event(), threading.Lock(), threading.Lock()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the runs are stopped too
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits this; SIGTERM stops its runs
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, before)

    def work(job: Job) -> None:
        if failed.is_set():
            return
        started = time.monotonic()
        with tempfile.NamedTemporaryFile("r") as errors:
            process = forkserver.Process(target=_train, args=(job.command, errors.name))
            with starting:
                process.start()
            running.add(process)
            if failed.is_set():  # the first start waits for the server's imports, and another run may have failed by then
                process.terminate()
            try:
                multiprocessing.connection.wait([process.sentinel])
                with starting:  # start() also asks which processes have ended, and an exit code can be read only once
                    process.join()
            finally:
                running.discard(process)
            if failed.is_set():
                return
            lines = errors.read().strip().splitlines()
        last = lines[-1] if lines else "no message"
        if process.exitcode and _diverged(last):
            (job.folder / "diverged.txt").write_text(last.removeprefix("train_gpt: ") + "\n")
        elif process.exitcode:
            failed.set()
            raise UserError(f"{relative(job.folder)} failed: {last}")
        state = job.state()
        loss = f"{curve(job.record()['metrics'])[-1]['val_loss']:.4f}" if state == "done" else state
        with packing:
            pack([job])
        print(f"  {relative(job.folder)}   {loss}   {time.monotonic() - started:.0f} s", flush=True)

    pack(jobs)
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        try:
            for future in [pool.submit(work, job) for job in waiting]:
                future.result()
        except BaseException:
            failed.set()
            for process in list(running):
                process.terminate()  # train_gpt.py writes a checkpoint first
            raise


def _reached(record: Record) -> float:
    """The update of the last validation; infinite for a run that diverged."""
    points = curve(record["metrics"])
    return float("inf") if "diverged" in record else points[-1]["update"] if points else -1


def _environment_of(folder: Path) -> dict[str, Any]:
    """The part of the last launch's environment that is kept."""
    try:
        last = json.loads((folder / "environment.json").read_text())[-1]
    except (OSError, ValueError, IndexError):
        return {}
    return {name: last[name] for name in _ENVIRONMENT if name in last}


def _diverged(message: str) -> bool:
    return message.startswith("train_gpt: ") and any(word in message for word in (" is nan", " is inf", "not finite"))


def _train(command: list[str], errors: str) -> None:
    """Run `command` in this process, with its stderr in the file `errors`."""
    os.chdir(ROOT)
    for name, stream in ((os.devnull, 1), (errors, 2)):
        os.dup2(os.open(name, os.O_WRONLY), stream)
    if command[1] != "train_gpt.py":
        os.execv(command[0], command)  # a launcher of several ranks
    sys.argv = command[1:]
    runpy.run_path("train_gpt.py", run_name="__main__")
