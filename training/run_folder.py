"""The folder of a run: created once, never overwritten by accident. It records what ran, and where to continue."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from common.errors import UserError
from common.files import atomic_file, write_text
from common.machine import cpu_name
from training.checkpoint import has_checkpoints, list_checkpoints, newest_state, read_state
from training.config import Config

REQUEUE = "requeue"
_CONTENTS = (
    "checkpoints", "config.json", "environment.json", "code.diff", "metrics.jsonl", "model.safetensors", "wandb", "tensorboard",
    REQUEUE,
)  # fmt: skip
_VARIABLES = ("OMP_", "MKL_", "NCCL_", "CUDA_", "CUBLAS_", "TORCH_", "PYTORCH_", "GLOO_", "SLURM_JOB_ID")


def find_start(run_dir: Path, config: Config) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to start from and its state, or None. Changes nothing on disk.

    Raises UserError if the folder holds a run that this one neither resumes nor may overwrite, or if there is nothing to
    resume at the given path.
    """
    try:
        found = _find(run_dir, config)
        if found is not None:
            _check_metrics(*found)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return found or (None, None)


def prepare_run(run_dir: Path, config: Config, source: Path | None, state: dict[str, Any] | None) -> None:
    """Create the run's folder, remove an older run from it, and describe the run in it."""
    try:
        own = source is not None and is_in(source, run_dir)
        content = None if source is None or own else (source.parent.parent / "metrics.jsonl").read_bytes()
        if not own:
            _clear(run_dir)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / REQUEUE).unlink(missing_ok=True)  # this run goes on
        if content is not None:  # the curve up to the checkpoint of the other run
            (run_dir / "metrics.jsonl").write_bytes(content)
        _describe(run_dir, config, state["step"] if state else 0)
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def lock_of(run_dir: Path) -> FileLock:
    """The lock of a run's folder, not yet held. The system releases it when the process ends, whatever the reason."""
    return FileLock(run_dir.parent / f".{run_dir.name}.lock")


def hold(lock: FileLock, run_dir: Path) -> None:
    """Keep other processes from writing to this run. Raises UserError if one already does."""
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run_dir} is being written by another process; wait for it, or choose another --run-name") from None
    except FileExistsError as error:  # results_dir is a file
        raise _unwritable(run_dir, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename)) from None
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or run_dir} can't be written ({error.strerror}); choose another --results-dir")


def is_in(checkpoint: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is one of this run's."""
    return checkpoint.resolve().parent == (run_dir / "checkpoints").resolve()


def _find(run_dir: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from; None to start fresh."""
    own = run_dir / "checkpoints"
    exists = run_dir.exists() and any(run_dir.iterdir())
    if exists and not _is_run(run_dir):
        raise UserError(
            f"{run_dir} is not a run of this trainer and was left alone; choose another --run-name or --results-dir"
        )
    if config.resume == "auto":
        found = newest_state(own)
        if found is None and has_checkpoints(own) and not config.overwrite:
            raise UserError(f"no checkpoint in {own} can be used ({_why(own)}); --overwrite starts the run again")
        return found
    if config.resume:
        path = Path(config.resume)
        if not path.exists():
            raise UserError(f"--resume {path}: there is no such checkpoint; --resume auto takes this run's newest, if any")
        inside = path / "checkpoints"
        found = newest_state(inside) if inside.is_dir() else (path, read_state(path))
        if found is None:
            raise UserError(f"--resume {path}: that run has no checkpoint that can be used ({_why(inside)})")
        if exists and not is_in(found[0], run_dir) and not config.overwrite:
            raise UserError(f"{run_dir} holds another run; choose another --run-name, or --overwrite it")
        return found
    if exists and not config.overwrite:
        raise UserError(f"{run_dir} exists; --resume auto continues it, --overwrite replaces it, --run-name names another")
    return None


def _why(checkpoints: Path) -> str:
    """Why the newest of the checkpoints can't be used."""
    try:
        for newest in list_checkpoints(checkpoints)[:1]:
            read_state(newest)
    except UserError as error:
        return str(error)
    return "there is none"


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or the remains of one that was killed early."""
    try:
        Config.from_dict(json.loads((folder / "config.json").read_text()))
        return True
    except (OSError, ValueError, UserError):
        return all(_is_ours(path) for path in folder.iterdir())


def _is_ours(path: Path) -> bool:
    return path.name in _CONTENTS or any(path.match(f".{name}.*.tmp") for name in _CONTENTS)


def _clear(run_dir: Path) -> None:
    """Remove an older run from its folder, but no other file that a user may have put there."""
    for path in run_dir.iterdir() if run_dir.exists() else ():
        if _is_ours(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def ask_for_requeue(run_dir: Path) -> None:
    """Leave the marker that makes scripts/slurm.sh requeue the job."""
    with suppress(OSError), atomic_file(run_dir / REQUEUE):  # a full disk must not turn a clean stop into a failure
        pass


def _check_metrics(checkpoint: Path, state: dict[str, Any]) -> None:
    source = checkpoint.parent.parent / "metrics.jsonl"
    size = source.stat().st_size if source.exists() else 0
    if size < state["metrics_bytes"]:
        raise UserError(f"{source} is shorter than when {checkpoint.name} was written; it belongs to the checkpoint")


def _describe(run_dir: Path, config: Config, step: int) -> None:
    """Write the resolved config, the environment of every launch with its first step, and uncommitted changes."""
    root = Path(__file__).resolve().parent.parent
    environment = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "packages": sorted({found.stem for entry in sys.path for found in Path(entry).glob("*.dist-info")}),
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
        "revision": _git(root, "rev-parse", "HEAD").strip(),
    }
    path = run_dir / "environment.json"
    try:
        launches = json.loads(path.read_text()) if step else []
    except (OSError, ValueError):
        launches = []
    for name, text in (
        ("config.json", json.dumps(config.to_dict(), indent=1)),
        ("environment.json", json.dumps([*launches, environment], indent=1)),
        ("code.diff", _git(root, "diff", "HEAD")),
    ):
        write_text(run_dir / name, text)


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
