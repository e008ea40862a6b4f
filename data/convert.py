"""Turn the tokens of another project into shards: `python -m data.convert DIR --out data/mine`.

It reads what two projects of Karpathy write:

- build-nanogpt: `edufineweb_train_000001.npy`, ..., `edufineweb_val_000000.npy`, each one array of tokens;
- nanoGPT: `train.bin` and `val.bin`, uint16 tokens without a header.

The tokens stay as they are, in their order. They pass through memory in pieces, each is checked against the vocabulary, and
the new files are read back and compared with what was written. (llm.c's shards are ours already.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import Parser, UserError, one_line_errors, positive
from data.shards import MAGIC, SPLITS, TOKEN, Manifest, Progress, check_numbering, new_shards, shard_info

GPT2_VOCABULARY = 50257
_PIECE = 1 << 22  # tokens


def find(directory: Path) -> tuple[str, dict[str, list[Path]]]:
    """The project that wrote the directory, and its files by split. Raises UserError if a split has none or one is lost."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    shards = {split: sorted(directory.glob(f"*_{split}_*.npy")) for split in SPLITS}
    whole = {split: [path] if (path := directory / f"{split}.bin").is_file() else [] for split in SPLITS}
    project, files = ("build-nanogpt", shards) if any(shards.values()) else ("nanoGPT", whole)
    for split, paths in files.items():
        if not paths:
            raise UserError(f"{directory}: holds neither *_{split}_*.npy (build-nanogpt) nor {split}.bin (nanoGPT)")
        check_numbering(directory, paths)
    return project, files


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of one file, memory-mapped. Raises UserError if it is not such a file."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise UserError(f"{path}: holds {tokens.dtype}{list(tokens.shape)}, not a row of tokens")
        else:
            if path.stat().st_size % TOKEN.itemsize:
                raise UserError(f"{path}: has an odd number of bytes, so it is cut off or does not hold uint16; copy it again")
            tokens = np.memmap(path, dtype=TOKEN, mode="r")
            if tokens[:2].tobytes() == np.int32(MAGIC).astype("<i4").tobytes():
                name = f"tokens_{path.stem}_{0 if path.stem == 'val' else 1:06d}.bin"
                raise UserError(f"{path}: is a shard already, under another name; rename it to {name}")
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read ({reason}); copy it again") from None
    if not tokens.size:
        raise UserError(f"{path}: holds no tokens; copy it again")
    return tokens


def pieces(path: Path, vocab_size: int) -> Iterator[np.ndarray]:
    """The tokens of one file, piece by piece. Raises UserError at a token outside the vocabulary."""
    tokens = open_tokens(path)
    for start in range(0, len(tokens), _PIECE):
        piece = np.asarray(tokens[start : start + _PIECE])
        wrong = (piece < 0) | (piece >= vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{path}: token {piece[at]} (number {start + at}) is outside the vocabulary of {vocab_size}; "
                "give the right --vocab-size"
            )
        yield piece.astype(np.uint16)


def convert(
    directory: Path | str,
    out_dir: Path | str,
    vocab_size: int | None = None,
    *,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write the directory's tokens as train and val shards with a manifest. Returns the manifest.

    Without `vocab_size` the tokens are GPT-2's. Raises UserError if a file is missing, lost or damaged, if a token is outside
    the vocabulary, or if `out_dir` cannot be written or holds shards and `overwrite` is false. Then nothing is changed.
    """
    directory, out_dir = Path(directory), Path(out_dir)
    project, files = find(directory)
    meta = directory / "meta.pkl"
    if vocab_size is None and project == "nanoGPT" and meta.exists():
        raise UserError(f"{meta}: so the tokens are not GPT-2's; give the size of their vocabulary with --vocab-size")
    size = vocab_size or GPT2_VOCABULARY
    if size > 1 << 16:
        raise UserError(f"--vocab-size must be at most {1 << 16}, not {size}: shards hold uint16")
    encoding = "gpt2" if size == GPT2_VOCABULARY else f"of {size} tokens"
    manifest = Manifest(encoding, size, f"tokens of {project}: {directory.name}", "that of the tokens")
    with new_shards(out_dir, manifest, "tokens", shard_tokens, overwrite) as writers:
        for split, paths in files.items():
            for path in paths:
                for piece in pieces(path, size):
                    writers[split].write(piece)
                    progress(len(piece))
            writers[split].close()
            for name, info in writers[split].files.items():
                if shard_info(writers[split].directory / name) != info:
                    raise UserError(f"{out_dir}: {name} reads back other than it was written; check the disk")
    return manifest


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        prog="python -m data.convert", description="Turn the tokens of build-nanogpt or nanoGPT into shards, and verify them."
    )
    parser.add_argument("directory", type=Path, help="holds *_train_*.npy and *_val_*.npy, or train.bin and val.bin")
    parser.add_argument("--out", type=Path, required=True, help="the directory for the shards")
    parser.add_argument("--vocab-size", type=positive, help=f"of the tokens; default: GPT-2's, {GPT2_VOCABULARY}")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --out holds")
    options = parser.parse_args(arguments)
    from tqdm import tqdm

    total = sum(len(open_tokens(path)) for paths in find(options.directory)[1].values() for path in paths)
    with tqdm(total=total, unit="token", unit_scale=True, desc="convert", disable=not sys.stderr.isatty()) as bar:
        manifest = convert(options.directory, options.out, options.vocab_size, overwrite=options.overwrite, progress=bar.update)
    print(manifest.summary(options.out))


if __name__ == "__main__":
    with one_line_errors("error"):
        main()
