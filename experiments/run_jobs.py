"""Starts or resumes runs, a few at a time and each in a process of its own, and packs them.

A run writes to runs/, which is not kept. Its measurements are packed: one file per arm of a study, one line of JSON per run
(reading/runs.py). A packed run counts as done, so a study can continue without runs/.
"""

import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import Diverged, UserError
from common.files import write_text
from reading.runs import Run, read_packed, read_run, write_packed
from training.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
CONTINUES = "stopped; the same command continues"

# Options that may change without making it another run.
_FREE = {"steps", "val_every", "log_every", "checkpoint_every", "keep_checkpoints", "data_dir", "device", "compile"}
_ENVIRONMENT = ("time", "platform", "device", "cores", "threads", "python", "torch", "cuda", "revision")  # what is packed


@dataclass(frozen=True)
class Job:
    """One run: its folder, the file that it is packed into, its config file, and the options that override it."""

    folder: Path
    packed: Path
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.options["steps"])

    @property
    def words(self) -> list[str]:
        """The options as a command line, with paths inside the repository relative to it."""
        place = {"results_dir": relative(self.folder.parent), "run_name": self.folder.name}
        return [f"--config={self.config}", "--resume=auto", *words_of({**place, **self.options})]

    @property
    def line(self) -> str:
        """The command of this run as typed in a shell."""
        return shlex.join(["python", "train_gpt.py", *self.words])

    def load(self) -> Config:
        """The run's full configuration. Raises UserError for a mistake in it."""
        return load_config([f"--config={ROOT / self.config}", *self.words[1:]])

    def read(self) -> Run | None:
        """The packed run or the folder's, whichever is further on; None if there is neither."""
        packed = read_packed(self.packed).get(self.folder.name) if self.packed.exists() else None
        here = read_run(self.folder) if (self.folder / "metrics.jsonl").exists() else None
        return max((run for run in (packed, here) if run is not None), key=_reached, default=None)

    def changed(self, run: Run | None) -> str:
        """A message that names a setting that differs from the one this run was started with; empty if there is none."""
        saved = run.config if run is not None else {}
        for name in sorted(self.options.keys() & saved.keys() - _FREE):
            if not _same(saved[name], self.options[name]):
                was, now = saved[name], self.options[name]
                return f"{relative(self.folder)} was run with {name} = {was}, not {now}; remove its record to run it again"
        return ""

    def state(self, run: Run | None) -> str:
        """`done`, `diverged`, `begun` or `new`."""
        if run is None:
            return "new"
        if run.diverged is not None:
            return "diverged"
        return "begun" if math.isnan(self.loss_at(run, self.steps)) else "done"

    def loss_at(self, run: Run | None, update: int) -> float:
        """The validation loss at an update; infinite if the run diverged, nan if it is not that far yet.

        Raises UserError if the run went past the update without a validation.
        """
        if run is None:
            return math.nan
        found = {point["update"]: point["val_loss"] for point in run.curve()}
        if update in found:
            return found[update] if math.isfinite(found[update]) else math.inf
        if run.diverged is not None:
            return math.inf
        if _reached(run) > update:
            raise UserError(f"{relative(self.folder)} was not validated at update {update}; choose other --steps")
        return math.nan

    def finished(self, run: Run | None) -> bool:
        return self.state(run) in ("done", "diverged")


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


def _reached(run: Run) -> float:
    """The update of the last validation; infinite for a run that diverged."""
    points = run.curve()
    return math.inf if run.diverged is not None else points[-1]["update"] if points else -1


def plan_of(jobs: Iterable[Job]) -> str:
    """The jobs, a line each: the state and the command."""
    return "\n".join(f"{job.state(job.read()):8} {job.line}" for job in jobs)


def pack(jobs: Iterable[Job]) -> None:
    """Write finished runs into their packed files. Other runs in the files stay."""
    files: dict[Path, dict[str, Run]] = {}
    for job in jobs:
        job.packed.parent.mkdir(parents=True, exist_ok=True)  # before the first run, in case it fails
        run, finished = job.read(), files.setdefault(job.packed, {})
        if run is not None and not run.packed and job.finished(run):
            kept = {name: run.environment[name] for name in _ENVIRONMENT if name in run.environment}
            name = run.config.get("optimizer", "")
            packages = [p for p in run.environment.get("packages", ()) if p.partition("-")[0] == re.split("[.:]", name)[0]]
            kept |= {"package": packages[0].replace("-", " ")} if ":" in name and packages else {}
            finished[job.folder.name] = replace(run, name=job.folder.name, environment=kept)
    for path, finished in files.items():
        if finished:
            before = read_packed(path) if path.exists() else {}
            write_packed(path, [*({**before, **finished}).values()])


# The processes --------------------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], at_once: int) -> None:
    """Run the jobs that are not finished, `at_once` at a time, in the order given, and pack each when it is.

    An interruption stops the runs, which write a checkpoint first; the next call resumes them. A run whose loss is not finite
    ends as `diverged`. Any other failure stops all runs and raises a UserError.
    """
    found = [(job, job.read()) for job in jobs]
    if wrong := next(filter(None, (job.changed(run) for job, run in found)), ""):
        raise UserError(wrong)
    waiting = [job for job, run in found if not job.finished(run)]
    print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} done, {len(waiting)} to run", flush=True)
    pack(jobs)
    if not waiting:
        return
    configs = [job.load() for job in waiting]
    with processes(min(at_once, len(waiting))) as pool:
        started = {pool.submit(_train, config): job for job, config in zip(waiting, configs, strict=True)}
        for future in as_completed(started):
            _settle(started[future], future)


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that train. If the block raises, they stop: a run that has begun writes a checkpoint first."""
    # A process that has asked for CUDA must not be forked, so a server that has not is.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_gpt", "torch._dynamo"])  # importing them takes as long as 100 updates
    in_main, before = threading.current_thread() is threading.main_thread(), {}
    if in_main:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits it
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    stopping, others = context.Event(), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, _begin, (stopping,))
    try:
        yield pool
    except BaseException:
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _settle(job: Job, future: Future[tuple[float, str]]) -> None:
    """Pack a run that has ended, and print its result. Raises UserError if it failed."""
    name = relative(job.folder)
    try:
        seconds, failure = future.result()
    except BrokenExecutor:
        raise UserError("a run was killed, perhaps because memory ran out; choose fewer --jobs") from None
    if failure:
        raise UserError(f"{name} failed: {failure}")
    pack([job])
    run = job.read()
    state = job.state(run)
    if state not in ("done", "diverged"):
        raise UserError(f"{name} was stopped; the same command continues")
    loss = f"{job.loss_at(run, job.steps):.4f}" if state == "done" else state
    print(f"  {name}   {loss}   {seconds:.0f} s", flush=True)


# In a process of the pool ---------------------------------------------------------------------------------------------

_stopping: Any = None  # an event that says that no more runs are wanted


def _begin(stopping: Any) -> None:
    """Make this process ready for runs: quiet, with one thread, and no longer alive than its parent."""
    global _stopping
    import torch
    from tqdm import tqdm

    _stopping = stopping
    os.chdir(ROOT)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore of the system, which would outlive a process that is killed
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    _stopping.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: Config) -> tuple[float, str]:
    """One run. Returns its seconds and, if it failed, how. A run that diverges is no failure; it says so in diverged.txt."""
    if _stopping.is_set():
        os._exit(0)
    from train_gpt import train

    began, failure = time.monotonic(), ""
    try:
        train(config)
    except Diverged as error:
        write_text(Path(config.results_dir) / config.run_name / "diverged.txt", f"{error}\n")
    except UserError as error:
        failure = str(error)
    except Exception as error:  # such as one of a user's optimizer
        failure = " ".join(f"{type(error).__name__}: {error}".split())
    if _stopping.is_set():  # after a stop the pool may wait for this process, which would wait for the next run
        os._exit(0)
    return time.monotonic() - began, failure
