"""The shard format, its manifest, and `python -m data.shards DIR`, which verifies a data directory.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by the tokens as
little-endian uint16: the format of the FineWeb-10B shards on the hub. A file is named `{prefix}_{split}_{index:06d}.bin`,
and the split is `train` or `val`. `manifest.json` in the same directory says what each file must hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from common.errors import Parser, UserError, one_line_errors
from common.files import atomic_file, sync_directory, write_text

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")
MAX_SHARD_TOKENS = 2**31 - 1  # the count is an int32
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
_CHUNK_TOKENS = 1 << 22

Progress = Callable[[int], object]  # called with the bytes done since the last call


def _silent(_: int) -> None:
    pass


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest records of one shard."""

    bytes: int
    tokens: int
    sha256: str
    min_token: int
    max_token: int


@dataclass
class Manifest:
    """The contents of `manifest.json`: where the tokens come from and what each file must hold."""

    encoding: str
    vocab_size: int
    source: str
    licence: str
    files: dict[str, ShardInfo] = field(default_factory=dict)

    def summary(self, directory: Path) -> str:
        """What a command that wrote the shards prints."""
        lines = []
        for split in SPLITS:
            counts = [info.tokens for name, info in self.files.items() if f"_{split}_" in name]
            lines.append(f"{split}: {sum(counts):,} tokens in {len(counts)} shards")
        return "\n".join([*lines, f"{self.encoding}, vocabulary {self.vocab_size}, in {directory}"])


# ---- writing


def write_shard(path: Path | str, tokens: np.ndarray) -> ShardInfo:
    """Write 1-D integer `tokens` as one shard, atomically. Returns its manifest entry.

    Raises ValueError if they are empty or do not fit uint16.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size <= MAX_SHARD_TOKENS or tokens.dtype.kind not in "iu":
        raise ValueError(f"a shard holds 1 to {MAX_SHARD_TOKENS} integers, not {tokens.dtype}{tokens.shape}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        raise ValueError(f"tokens {low} to {high} do not fit uint16")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    body = np.ascontiguousarray(tokens, dtype=TOKEN)
    digest = hashlib.sha256(header.tobytes())
    digest.update(body.data)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(body.data)
    return ShardInfo(HEADER_BYTES + body.nbytes, tokens.size, digest.hexdigest(), low, high)


class ShardWriter:
    """Streams the tokens of one split into shards of `shard_tokens` tokens each (the last one may be shorter)."""

    def __init__(self, directory: Path | str, prefix: str, split: str, shard_tokens: int) -> None:
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            raise UserError(f"tokens per shard must be 1 to {MAX_SHARD_TOKENS}, not {shard_tokens}")
        self.directory, self.prefix, self.split, self.shard_tokens = Path(directory), prefix, split, shard_tokens
        self.files: dict[str, ShardInfo] = {}
        self.tokens = 0
        self._chunks: list[np.ndarray] = []
        self._pending = 0
        self._index = 0 if split == "val" else 1  # as in FineWeb: train counts from 1, val from 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens. Writes a shard whenever there are `shard_tokens`."""
        self.tokens += len(tokens)
        start = 0
        while start < len(tokens):
            chunk = tokens[start : start + self.shard_tokens - self._pending]
            self._chunks.append(chunk)
            self._pending += len(chunk)
            start += len(chunk)
            if self._pending == self.shard_tokens:
                self._cut()

    def close(self) -> None:
        """Write the remaining tokens."""
        if self._pending:
            self._cut()

    def _cut(self) -> None:
        name = f"{self.prefix}_{self.split}_{self._index:06d}.bin"
        self.files[name] = write_shard(self.directory / name, np.concatenate(self._chunks))
        self._index += 1
        self._chunks, self._pending = [], 0


@contextmanager
def new_shards(
    out_dir: Path, manifest: Manifest, prefix: str, shard_tokens: int, overwrite: bool
) -> Iterator[dict[str, ShardWriter]]:
    """A writer for each split. When the block ends, their shards and the manifest are in `out_dir`, in place of old ones.

    If the block raises, `out_dir` stays as it was. Raises UserError if `out_dir` cannot be written, or if it holds shards and
    `overwrite` is false.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        old = list_shards(out_dir)
        if old and not overwrite:
            raise UserError(f"{out_dir}: already holds {len(old)} shards; choose another --out, or --overwrite")
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".tokenizing-") as building:
            writers = {split: ShardWriter(building, prefix, split, shard_tokens) for split in SPLITS}
            yield writers
            for writer in writers.values():
                writer.close()
                manifest.files |= writer.files
            # The manifest is written before the shards. If this stops halfway, a shard in it is missing, and training refuses
            # the directory.
            for path in old:
                path.unlink()
            write_manifest(out_dir, manifest)
            for name in manifest.files:
                os.replace(Path(building) / name, out_dir / name)
            sync_directory(out_dir)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space, nothing was changed" if full else ""
        raise UserError(f"{out_dir}: cannot be written ({error.strerror or error}){hint}") from None


# ---- reading


def check_shard(path: Path | str) -> int:
    """The number of tokens of a shard. Raises UserError if its header or size is wrong."""
    path = Path(path)
    again = "delete it, then download or tokenize it again"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file, so not a shard; remove it from the data directory")
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such shard; download it (python -m data.fineweb) or tokenize some text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes are too few for a shard's header of {HEADER_BYTES}; {again}")
    magic, version, tokens = (int(number) for number in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UserError(f"{path}: not a token shard (magic {magic}, not {MAGIC}); remove it from the data directory")
    if version != VERSION:
        raise UserError(f"{path}: shard version {version}, but only version {VERSION} is known; {again}")
    if tokens <= 0:
        raise UserError(f"{path}: its header says {tokens} tokens; {again}")
    expected = HEADER_BYTES + TOKEN.itemsize * tokens
    if size < expected:
        raise UserError(f"{path}: truncated, {size} of {expected} bytes; {again}")
    if size > expected:
        raise UserError(f"{path}: {size - expected} bytes after the last of its {tokens} tokens; {again}")
    return tokens


def open_shard(path: Path | str) -> np.memmap:
    """The tokens of a shard, memory-mapped read-only. Raises UserError as `check_shard` does."""
    tokens = check_shard(path)
    try:
        return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(tokens,))
    except (OSError, ValueError) as error:  # ValueError: the file shrank since it was checked
        raise UserError(f"{path}: cannot be memory-mapped ({error})") from None


def list_shards(directory: Path | str, split: str | None = None) -> list[Path]:
    """The shards of a split (or of all splits), sorted by name."""
    splits = SPLITS if split is None else (split,)
    return sorted(path for name in splits for path in Path(directory).glob(f"*_{name}_*.bin"))


def shard_info(path: Path | str, progress: Progress = _silent) -> ShardInfo:
    """Check a shard and read all of it. Returns its manifest entry. Raises UserError as `check_shard` does."""
    path = Path(path)
    tokens = open_shard(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    progress(HEADER_BYTES)
    low, high = 65535, 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.array(tokens[start : start + _CHUNK_TOKENS])
        digest.update(chunk.data)
        low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        progress(chunk.nbytes)
    return ShardInfo(HEADER_BYTES + tokens.nbytes, len(tokens), digest.hexdigest(), low, high)


# ---- the manifest


def write_manifest(directory: Path | str, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically."""
    manifest.files = dict(sorted(manifest.files.items()))
    write_text(Path(directory) / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(directory: Path | str) -> Manifest | None:
    """The manifest of a data directory, None if there is none; raises UserError if it is damaged."""
    path = Path(directory) / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        files = {name: ShardInfo(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(**raw, files=files)
        integers = [manifest.vocab_size]
        integers += [number for info in files.values() for number in (info.bytes, info.tokens, info.min_token, info.max_token)]
        if any(Path(name).name != name for name in files):
            raise ValueError("a file outside the directory")
        if not all(type(number) is int for number in integers):
            raise ValueError("a number is not an integer")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged ({reason}); delete it and verify the shards") from None
    return manifest


def check_split(directory: Path | str, split: str) -> tuple[list[Path], Manifest | None]:
    """The shards of a split, and the manifest. Raises UserError if a header or size is wrong, a shard is missing, or the
    manifest disagrees.

    Training calls this before it starts. It opens each file but reads no tokens.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such data directory; make it with python -m data.fineweb")
    paths = list_shards(directory, split)
    if not paths:
        raise UserError(f"{directory}: holds no {split} shards (*_{split}_*.bin){foreign(directory)}")
    manifest = read_manifest(directory)
    counts = {path.name: check_shard(path) for path in paths}
    check_numbering(directory, paths)
    if manifest is None:
        return paths, None
    for name in manifest.files:
        if f"_{split}_" in name and name not in counts:
            raise UserError(f"{directory / name}: listed in {MANIFEST} but missing; download or tokenize the data again")
    for name, tokens in counts.items():
        info = manifest.files.get(name)
        if info and (info.tokens, info.bytes) != (tokens, HEADER_BYTES + TOKEN.itemsize * tokens):
            raise UserError(
                f"{directory / name}: {tokens} tokens, but {MANIFEST} says {info.tokens}: not the same file; "
                "delete it, then download or tokenize it again"
            )
        if info and info.max_token >= manifest.vocab_size:
            raise UserError(
                f"{directory / name}: holds the token {info.max_token}, outside its vocabulary of "
                f"{manifest.vocab_size} ({MANIFEST}); tokenize the data again"
            )
    return paths, manifest


def check_numbering(directory: Path, paths: list[Path]) -> None:
    """Raise UserError if a number is missing: a file was lost, and training would use the wrong tokens."""
    last: dict[str, int] = {}
    for path in paths:
        match = re.fullmatch(r"(.*_)(\d+)", path.stem)
        if not match:
            continue
        prefix, index = match[1], int(match[2])
        if prefix in last and index > last[prefix] + 1:
            raise UserError(
                f"{directory / f'{prefix}{last[prefix] + 1:06d}{path.suffix}'}: missing, though {path.name} is there; "
                "download or copy it again"
            )
        last[prefix] = index


def foreign(directory: Path) -> str:
    """What to do with the tokens of another project that lie in a directory; "" if there are none."""
    if any(directory.glob("*_train_*.npy")) or any(directory.glob("*_val_*.npy")):
        found = "the .npy shards of build-nanogpt"
    elif (directory / "train.bin").is_file() or (directory / "val.bin").is_file():
        found = "nanoGPT's train.bin and val.bin"
    else:
        return ""
    return f" but {found}; convert them: python -m data.convert {directory} --out DIR"


# ---- verification


def verify(directory: Path | str, progress: Progress = _silent) -> dict[str, tuple[ShardInfo | None, str]]:
    """Read every shard of a directory. Maps names to (the shard's entry, what is wrong with it or "")."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    names = {path.name for path in list_shards(directory)} | set(manifest.files if manifest else ())
    results: dict[str, tuple[ShardInfo | None, str]] = {}
    for name in sorted(names):
        try:
            info = shard_info(directory / name, progress)
        except UserError as error:
            results[name] = (None, str(error).removeprefix(f"{directory / name}: "))
            continue
        recorded = manifest.files.get(name) if manifest else None
        wrong = ""
        if recorded and info != recorded:
            part = next(key for key, value in asdict(recorded).items() if value != getattr(info, key))
            wrong = f"{part} differs from {MANIFEST}: delete it, then download or tokenize it again"
        elif manifest and info.max_token >= manifest.vocab_size:
            wrong = f"token {info.max_token} is outside the vocabulary of {manifest.vocab_size}"
        results[name] = (info, wrong)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Verify a data directory and print a table."""
    parser = Parser(prog="python -m data.shards", description="Verify every shard of a data directory.")
    parser.add_argument("directory", type=Path, help="the directory with the *_train_*.bin and *_val_*.bin files")
    directory = parser.parse_args(arguments).directory
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in list_shards(directory))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        results = verify(directory, bar.update)
    if not results:
        raise UserError(f"{directory}: holds no shards (*_train_*.bin, *_val_*.bin){foreign(directory)}")
    manifest = read_manifest(directory)
    width = max(len(name) for name in results)
    print(f"{'file':{width}}  {'tokens':>13}  {'min':>5}  {'max':>5}  sha256        state")
    for name, (info, wrong) in results.items():
        unlisted = "" if manifest and name in manifest.files else f" (not in {MANIFEST}, so only its format is checked)"
        numbers = f"{info.tokens:13,}  {info.min_token:5}  {info.max_token:5}  {info.sha256[:12]}" if info else " " * 41
        print(f"{name:{width}}  {numbers}  {wrong or 'ok' + unlisted}")
    if manifest:
        print(f"{manifest.encoding}, vocabulary {manifest.vocab_size}: {manifest.source} ({manifest.licence})")
    bad = [name for name, (_, wrong) in results.items() if wrong]
    if bad:
        raise UserError(f"{directory}: {len(bad)} of {len(results)} shards are wrong; the first is {bad[0]}")


if __name__ == "__main__":
    with one_line_errors("error"):
        main()
