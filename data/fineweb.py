"""FineWeb-10B, already in GPT-2 tokens, from the hub: `python -m data.fineweb --shards 27`.

Fetches the validation shard and the first training shards of the dataset `kjj0/fineweb10B-gpt2` (100M tokens each;
FineWeb is under the Open Data Commons Attribution Licence). Correct files are kept, so run the same command again
after an interruption. A file gets its final name only when it is complete, has the hub's sha256 and is on disk.
`HF_ENDPOINT` names another hub.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import Parser, UserError, one_line_errors
from common.files import sync_directory
from data.shards import (
    Manifest,
    ShardInfo,
    read_manifest,
    shard_info,
    write_manifest,
)

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata
    from tqdm import tqdm

REPO = "kjj0/fineweb10B-gpt2"
SOURCE = f"hub dataset {REPO}: the FineWeb sample of 10B tokens, in GPT-2 tokens"
LICENCE = "ODC-By 1.0"
VOCAB_SIZE = 50257
TRAIN_SHARDS = 103
SHARD_BYTES = 200_001_024  # of every shard but the last; for the progress bar
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 1.0, 60.0, 600.0  # seconds
STALL_SECONDS = "30"  # without a byte

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
    # The hub's library reads these when it is imported.
    for variable in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        os.environ.setdefault(variable, STALL_SECONDS)
    # Plain HTTP obeys the time limits and resumes. Xet has other rules and a cache of its own.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from filelock import FileLock
        from huggingface_hub.utils import logging
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(f"{error.name} is needed to download: pip install huggingface_hub tqdm") from None
    logging.set_verbosity_error()  # retries are reported here, one line each

    data_dir = Path(data_dir)
    names = shard_names(train_shards)
    try:
        locks = data_dir / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "manifest.lock"):
            _own_manifest(data_dir)
        with tqdm(
            total=SHARD_BYTES * len(names), unit="B", unit_scale=True, desc="fineweb", disable=not sys.stderr.isatty()
        ) as bar:
            for name in names:
                with FileLock(locks / f"{name}.lock"):  # wait for another process that downloads the same file
                    done = _ensure(name, data_dir, bar)
                bar.write(f"{name}: {done}", file=sys.stdout)
        with suppress(OSError):  # not empty: another process is downloading
            (data_dir / ".downloading").rmdir()
    except OSError as error:
        raise UserError(f"{data_dir}: {error.strerror or error}") from None


def _ensure(name: str, data_dir: Path, bar: tqdm[Any]) -> str:
    """Make sure that one shard is correct and recorded. Returns what was done. The caller holds the file's lock."""
    path = data_dir / name
    begin = bar.n
    done = "downloaded"
    info = _what_is_there(path, bar)
    recorded = _own_manifest(data_dir).files.get(name)
    if info is not None and info == recorded:
        done = "already there"
    else:
        # The file is missing, unverified or wrong.
        if info is not None and recorded is None and _matches(info, _retried(name, lambda: _metadata(name))):
            done = "already there, now verified"
        else:
            path.unlink(missing_ok=True)
            bar.n = begin
            info = _fetch(name, data_dir, bar)
        _record(name, info, data_dir)
    bar.total += info.bytes - SHARD_BYTES
    bar.n = begin + info.bytes
    bar.refresh()
    return f"{done}, {info.tokens:,} tokens"


def _what_is_there(path: Path, bar: tqdm[Any]) -> ShardInfo | None:
    """The manifest entry of the file under its final name; None if there is none or it is not a valid shard."""
    if not path.exists():
        return None
    try:
        return shard_info(path, bar.update)
    except UserError as error:
        bar.write(f"{error}: it will be replaced", file=sys.stderr)
        return None


def _fetch(name: str, data_dir: Path, bar: tqdm[Any]) -> ShardInfo:
    """Download into a staging directory, verify, and only then move to the final name."""
    staging = data_dir / ".downloading" / name
    begin = bar.n

    def once() -> ShardInfo:
        bar.n = begin
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process or the last attempt
        return _fetch_once(name, data_dir, staging, bar)

    try:
        return _retried(name, once)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch_once(name: str, data_dir: Path, staging: Path, bar: tqdm[Any]) -> ShardInfo:
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Forward(tqdm):
        """The hub library's progress bar: it passes the bytes on to ours."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            bar.update(n)

    metadata = _metadata(name)
    free = shutil.disk_usage(data_dir).free
    if metadata.size is not None and metadata.size > free:
        raise UserError(f"{data_dir}: the disk is full ({name} needs {metadata.size:,} bytes, {free:,} are free)")
    # With local_dir the hub's library keeps no second copy in its cache.
    staged = Path(
        hf_hub_download(REPO, name, repo_type="dataset", revision=metadata.commit_hash, local_dir=staging, tqdm_class=Forward)
    )
    with staged.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    known = _sha256_of(metadata)
    if known is not None and digest != known:
        raise _DamagedError(f"its sha256 is {digest[:12]}…, the hub's is {known[:12]}…")
    try:
        info = shard_info(staged)
    except UserError as error:
        fault = str(error).removeprefix(f"{staged}: ").partition(";")[0]
        if known is not None:  # it is the hub's own file, so downloading it again does not help
            raise UserError(f"{name}: the hub's file is not a shard ({fault}); check HF_ENDPOINT") from None
        raise _DamagedError(fault) from None
    if info.max_token >= VOCAB_SIZE:
        raise _DamagedError(f"token {info.max_token} is outside GPT-2's vocabulary")
    os.replace(staged, data_dir / name)
    sync_directory(data_dir)
    return info


def _metadata(name: str) -> HfFileMetadata:
    """A file's size, sha256 and commit on the hub."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    metadata = get_hf_file_metadata(hf_hub_url(REPO, name, repo_type="dataset"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if metadata.commit_hash is None or metadata.etag is None:
        raise _DamagedError("the server is not a hub (no X-Repo-Commit or ETag); check HF_ENDPOINT and the proxy")
    return metadata


def _sha256_of(metadata: HfFileMetadata) -> str | None:
    """The file's sha256, which is the ETag of a large file; small files have another kind of ETag."""
    return metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None


def _matches(info: ShardInfo, metadata: HfFileMetadata) -> bool:
    known = _sha256_of(metadata)
    return info.sha256 == known if known is not None else info.bytes == metadata.size


def _retried(name: str, action: Callable[[], Result]) -> Result:
    """Retry failures that may be temporary, with doubling, jittered waits that honour Retry-After."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the exception types change between versions of the hub's library
            reason = _reason(name, error)
            if attempt == ATTEMPTS:
                raise UserError(f"{name}: {ATTEMPTS} attempts failed, the last: {reason}; run it again later") from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
            wait = max(wait, _retry_after(error))
            print(f"{name}: {reason}; trying again in {wait:.1f} s ({attempt} of {ATTEMPTS})", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("not reached")


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


def _retry_after(error: Exception) -> float:
    """The seconds that the server asks to wait; 0 if it asks for none."""
    response = getattr(error, "response", None)
    try:
        return min(LONGEST_RETRY_AFTER, float(response.headers.get("Retry-After", 0))) if response is not None else 0.0
    except ValueError:  # a date
        return 0.0


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
