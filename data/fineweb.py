"""FineWeb-10B, already in GPT-2 tokens, from the hub: `python -m data.fineweb --shards 27`.

Fetches the validation shard and the first training shards of the dataset `kjj0/fineweb10B-gpt2` (100M tokens each;
FineWeb is under the Open Data Commons Attribution Licence). Correct files are kept, so run the same command again
after an interruption. huggingface_hub does the transfer: it resumes a file whose connection broke or went silent, and
waits as long as the hub asks. This module tries again what that gives up, and checks the result: a file gets its final
name only when it is complete, has the hub's sha256 and is on disk. `HF_ENDPOINT` names another hub.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from logging import LogRecord
from pathlib import Path
from typing import NamedTuple, TypeVar

from common.errors import Parser, UserError, one_line_errors
from common.files import sync_directory
from data.shards import Manifest, ShardInfo, read_manifest, shard_info, write_manifest

REPO = "kjj0/fineweb10B-gpt2"
SOURCE = f"hub dataset {REPO}: the FineWeb sample of 10B tokens, in GPT-2 tokens"
LICENCE = "ODC-By 1.0"
VOCAB_SIZE = 50257
TRAIN_SHARDS = 103
ATTEMPTS = 5
FIRST_WAIT = 1.0  # seconds; it doubles
# What the hub's library reads when it is imported. Plain HTTP obeys the time limits and resumes; Xet has other rules and a
# cache of its own.
SETTINGS = {
    "HF_HUB_DOWNLOAD_TIMEOUT": "30",  # seconds without a byte
    "HF_HUB_ETAG_TIMEOUT": "30",
    "HF_HUB_DISABLE_XET": "1",
}

Result = TypeVar("Result")


class _DamagedError(Exception):
    """The downloaded file is not the hub's file."""


def shard_names(train_shards: int) -> list[str]:
    """The validation shard and the first training shards."""
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{index:06d}.bin" for index in range(1, train_shards + 1)]


def download(train_shards: int, data_dir: Path | str) -> None:
    """Make sure that `data_dir` holds the validation shard and the first `train_shards` training shards, all verified.

    Raises UserError if a shard cannot be downloaded or written, or if the directory holds other data.
    """
    if not 1 <= train_shards <= TRAIN_SHARDS:
        raise UserError(f"--shards must be 1 to {TRAIN_SHARDS}, not {train_shards}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://")
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT must start with http:// or https://, not {endpoint!r}")
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        from filelock import FileLock
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise UserError(f"{error.name} is needed to download: pip install huggingface_hub") from None
    logging.get_logger().handlers[0].addFilter(_one_line)

    data_dir = Path(data_dir)
    try:
        locks = data_dir / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "manifest.lock"):
            _own_manifest(data_dir)
        for name in shard_names(train_shards):
            with FileLock(locks / f"{name}.lock"):  # wait for another process that downloads the same file
                done = _ensure(name, data_dir)
            print(f"{name}: {done}", flush=True)
        with suppress(OSError):  # not empty: another process is downloading
            (data_dir / ".downloading").rmdir()
    except OSError as error:
        raise UserError(f"{data_dir}: {error.strerror or error}") from None


def _one_line(record: LogRecord) -> bool:
    """A filter that makes one short line of a message of the hub's library: its URLs are signed, and long."""
    record.msg, record.args = re.sub(r"https?://\S*[^\s:]", "the hub", " ".join(record.getMessage().split())), ()
    return True


def _ensure(name: str, data_dir: Path) -> str:
    """Make sure that one shard is correct and recorded. Returns what was done. The caller holds the file's lock."""
    path = data_dir / name
    found = None
    try:
        found = shard_info(path) if path.exists() else None
    except UserError as error:
        print(f"{error}: it will be replaced", file=sys.stderr)
    recorded = _own_manifest(data_dir).files.get(name)
    if found is not None and found == recorded:
        return f"already there, {found.tokens:,} tokens"
    # A shard that the manifest does not list was copied here, or its download was killed before it was recorded.
    if found is not None and recorded is None and found.sha256 == _retried(name, lambda: _on_the_hub(name)).sha256:
        done, info = "already there, now verified", found
    else:
        path.unlink(missing_ok=True)
        done, info = "downloaded", _fetch(name, data_dir)
    _record(name, info, data_dir)
    return f"{done}, {info.tokens:,} tokens"


def _fetch(name: str, data_dir: Path) -> ShardInfo:
    """Download into a staging directory, verify, and only then move to the final name."""
    staging = data_dir / ".downloading" / name

    def once() -> ShardInfo:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process or the last attempt
        return _fetch_once(name, data_dir, staging)

    try:
        return _retried(name, once)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch_once(name: str, data_dir: Path, staging: Path) -> ShardInfo:
    from huggingface_hub import hf_hub_download

    hub = _on_the_hub(name)
    free = shutil.disk_usage(data_dir).free
    if hub.size is not None and hub.size > free:
        raise UserError(f"{data_dir}: the disk is full ({name} needs {hub.size:,} bytes, {free:,} are free)")
    # With local_dir the hub's library keeps no second copy in its cache.
    staged = Path(hf_hub_download(REPO, name, repo_type="dataset", revision=hub.commit, local_dir=staging))
    with staged.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    if hub.sha256 is not None and digest != hub.sha256:
        raise _DamagedError(f"its sha256 is {digest[:12]}…, the hub's is {hub.sha256[:12]}…")
    try:
        info = shard_info(staged)
    except UserError as error:
        fault = str(error).removeprefix(f"{staged}: ").partition(";")[0]
        if hub.sha256 is not None:  # it is the hub's own file, so downloading it again does not help
            raise UserError(f"{name}: the hub's file is not a shard ({fault}); check HF_ENDPOINT") from None
        raise _DamagedError(fault) from None
    if info.max_token >= VOCAB_SIZE:
        raise _DamagedError(f"token {info.max_token} is outside GPT-2's vocabulary")
    os.replace(staged, data_dir / name)
    sync_directory(data_dir)
    return info


class _OnTheHub(NamedTuple):
    """What the hub says of a file. Only large files have a sha256 there."""

    commit: str
    size: int | None
    sha256: str | None


def _on_the_hub(name: str) -> _OnTheHub:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(REPO, name, repo_type="dataset")
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, retry_on_errors=True)
    if found.commit_hash is None or found.etag is None:
        raise _DamagedError("the server is not a hub (no X-Repo-Commit or ETag); check HF_ENDPOINT and the proxy")
    return _OnTheHub(found.commit_hash, found.size, found.etag if re.fullmatch(r"[0-9a-f]{64}", found.etag) else None)


def _retried(name: str, action: Callable[[], Result]) -> Result:
    """Try again, after doubling, jittered waits, what may be a temporary failure."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the exception types change between versions of the hub's library
            reason = _reason(name, error)
        if attempt < ATTEMPTS:
            wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            print(f"{name}: {reason}; trying again in {wait:.1f} s ({attempt} of {ATTEMPTS})", file=sys.stderr)
            time.sleep(wait)
    raise UserError(f"{name}: {ATTEMPTS} attempts failed, the last: {reason}; run it again later")


def _reason(name: str, error: Exception) -> str:
    """One line that says what failed. Raises UserError if trying again would not help."""
    text = " ".join(str(error).split())[:160] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        raise UserError(f"{name}: the disk is full; free some space and run it again (complete files are kept)") from None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise UserError(f"{name}: cannot be written ({os.strerror(number)})") from None
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise UserError(f"{name}: is missing, and HF_HUB_OFFLINE forbids the download") from None
    if status == 404:
        raise UserError(f"{name}: the hub has no such file in {REPO} (404); check HF_ENDPOINT") from None
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        raise UserError(f"{name}: the hub refuses it (HTTP {status}); check HF_TOKEN and HF_ENDPOINT") from None
    return f"HTTP {status}" if status is not None else text


def _own_manifest(data_dir: Path) -> Manifest:
    """The directory's manifest, or a new one; raises UserError if the directory holds other data."""
    manifest = read_manifest(data_dir) or Manifest("gpt2", VOCAB_SIZE, SOURCE, LICENCE)
    if manifest.source != SOURCE:
        raise UserError(f"{data_dir}: holds other data ({manifest.source}); choose another --data-dir")
    return manifest


def _record(name: str, info: ShardInfo, data_dir: Path) -> None:
    """Record a shard in the manifest, which other processes may be writing too."""
    from filelock import FileLock

    with FileLock(data_dir / ".locks" / "manifest.lock"):
        manifest = _own_manifest(data_dir)
        manifest.files[name] = info
        write_manifest(data_dir, manifest)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m data.fineweb", description="Download FineWeb-10B in GPT-2 tokens.")
    parser.add_argument("--shards", type=int, required=True, help=f"training shards of 100M tokens, 1 to {TRAIN_SHARDS}")
    parser.add_argument("--data-dir", type=Path, default=Path("data/fineweb10B"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    download(options.shards, options.data_dir)


if __name__ == "__main__":
    with one_line_errors("error"):
        main()
