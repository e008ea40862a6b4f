"""Loss, perplexity and bits per byte of trained models on token shards or text.

    python -m scripts.evaluate runs/gluon_b512 runs/mvr1_b512                    each on its own validation split
    python -m scripts.evaluate runs/gluon_b512/checkpoints/* --data data/mine    the validation shards of data/mine
    python -m scripts.evaluate runs/gluon_b512 --data essays.txt                 text, in the model's vocabulary

The tokens are read in windows of the model's seq_len, as a run's validation reads them: every token but the first is
predicted once. Bits per byte are the summed loss in bits divided by the bytes of the text. They can compare models with
different vocabularies.
"""

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import Parser, UserError, one_line_errors
from common.tables import aligned
from data.loader import TokenStream
from data.shards import list_shards, open_shard, read_manifest
from data.tokenize_text import Encoder, find_files, load_encoder, read_documents
from model import GPT
from reading.trained import Trained, load_trained
from training.devices import choose_device

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Tokens:
    """A stream of tokens: their number, a function that reads [start, stop), and their encoding if it is known."""

    name: str
    count: int
    read: Callable[[int, int], np.ndarray]
    encoding: str | None = None


@dataclass(frozen=True)
class Score:
    """The mean loss in nats per token over `tokens` predicted tokens. Their text has `bytes` bytes (None: not known)."""

    loss: float
    tokens: int
    bytes: int | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """NaN if the bytes are not known."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


@torch.no_grad()
def evaluate(model: GPT, tokens: Tokens, count: int, autocast: torch.autocast, byte_lengths: np.ndarray | None) -> Score:
    """The score of the first `count` predictions. `byte_lengths` (V,): the number of bytes of each token in the vocabulary."""
    device, seq_len = model.embedding.weight.device, model.config.seq_len
    total, size = 0.0, 0
    with tqdm(total=count, unit="token", unit_scale=True, desc=tokens.name, disable=None, leave=False) as bar:
        for rows in _batches(count, seq_len):
            window = np.stack([tokens.read(start, stop + 1) for start, stop in rows]).astype(np.int64)
            if window.max() >= model.config.vocab_size:
                raise UserError(
                    f"{tokens.name}: holds the token {window.max()}, outside the model's vocabulary of "
                    f"{model.config.vocab_size}; give data of the model's own vocabulary"
                )
            batch = torch.from_numpy(window).to(device)
            with autocast:
                total += model(batch[:, :-1], batch[:, 1:]).item() * batch[:, 1:].numel()
            if byte_lengths is not None:
                size += int(byte_lengths[window[:, 1:]].sum())
            bar.update(batch[:, 1:].numel())
    return Score(total / count, count, size if byte_lengths is not None else None)


def _batches(count: int, seq_len: int) -> Iterable[list[tuple[int, int]]]:
    """Windows [start, stop), grouped by forward pass. A shorter last window is a group of its own."""
    whole, at_once = count // seq_len, max(1, _TOKENS_AT_ONCE // seq_len)
    for first in range(0, whole, at_once):
        yield [(i * seq_len, (i + 1) * seq_len) for i in range(first, min(first + at_once, whole))]
    if count % seq_len:
        yield [(whole * seq_len, count)]


def lengths_of(encoder: Encoder, vocabulary: int) -> np.ndarray:
    """The number of bytes of each token, (vocabulary,); 0 for the end of text."""
    lengths = np.zeros(max(vocabulary, encoder.vocab_size), dtype=np.int64)
    for token in range(encoder.vocab_size):
        if token != encoder.end_of_text:
            lengths[token] = len(encoder.decode(token))
    return lengths


def open_tokens(paths: list[Path], split: str, encoding: str | None) -> Tokens:
    """The tokens at these paths: one folder of shards, one shard, or text files, which are encoded with `encoding`.

    Raises UserError if the paths hold none of these, or if there is no encoding for text.
    """
    name, first = ", ".join(map(str, paths)), paths[0]
    if len(paths) == 1 and first.suffix == ".bin":
        shard, manifest = open_shard(first), read_manifest(first.parent)
        return Tokens(name, len(shard), lambda start, stop: shard[start:stop], manifest and manifest.encoding)
    if len(paths) == 1 and first.is_dir() and list_shards(first):
        stream, manifest = TokenStream(first, split), read_manifest(first)
        return Tokens(name, stream.tokens, stream.read, manifest and manifest.encoding)
    files = find_files(paths)
    if encoding is None:
        raise UserError(f"{name}: text needs a model whose vocabulary is GPT-2's or bytes")
    encoder = load_encoder(encoding)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None, leave=False) as bar:
        documents = list(read_documents(files, "text", bar.update))
    if not documents:
        raise UserError(f"{name}: holds no documents")
    parts = [part for tokens in encoder.encode(documents) for part in ([encoder.end_of_text], tokens)]
    stream = np.concatenate(parts).astype(np.uint16)
    return Tokens(name, len(stream), lambda start, stop: stream[start:stop], encoding)


def score(trained: Trained, paths: list[Path], split: str, most: int | None, autocast: torch.autocast) -> tuple[str, Score]:
    """What the model was evaluated on, and its score."""
    encoding = None
    with suppress(UserError):  # an unknown vocabulary gives a loss too, but no bits per byte
        encoding = trained.encoding
    own = trained.config.get("data_dir")
    if not paths and not isinstance(own, str):
        raise UserError(f"{trained.weights}: the config next to it names no data; give --data")
    if not paths and not Path(own).is_dir():
        raise UserError(f"{own}: the run's data is not there; give --data")
    tokens = open_tokens(paths or [Path(own)], split, encoding)
    if encoding and tokens.encoding and tokens.encoding != encoding:
        raise UserError(f"{tokens.name}: its tokens are {tokens.encoding}, but {trained.weights} needs {encoding}; give text")
    seq_len = trained.model.config.seq_len
    if most is None and not paths and type(trained.config.get("val_tokens")) is int:  # what the run itself evaluated
        most = max(seq_len, trained.config["val_tokens"] // seq_len * seq_len)
    count = min(tokens.count - 1, most or tokens.count)
    if count < 1:
        raise UserError(f"{tokens.name}: has {tokens.count} tokens, but an evaluation needs at least 2")
    known = tokens.encoding or encoding
    lengths = lengths_of(load_encoder(known), trained.model.config.vocab_size) if known in ("gpt2", "bytes") else None
    return tokens.name, evaluate(trained.model, tokens, count, autocast, lengths)


def main(argv: list[str]) -> None:
    """Load, evaluate, print."""
    parser = Parser(prog="evaluate", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="runs, checkpoints or model.safetensors files")
    parser.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="PATH", help="a folder of shards, a shard, or files of text (.txt, "
        ".jsonl, .parquet); default: the tokens that the run itself validates on",
    )  # fmt: skip
    parser.add_argument("--split", default="val", choices=("val", "train"), help="of a folder of shards (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="most predictions to make (default: all)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 is autocast (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.tokens is not None and arguments.tokens < 1:
        raise UserError(f"--tokens must be at least 1, not {arguments.tokens}")
    device = choose_device(arguments.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16")
    rows = [("model", "data", "tokens", "loss", "perplexity", "bits/byte")]
    for path in arguments.models:
        trained = load_trained(path, device)
        data, result = score(trained, arguments.data, arguments.split, arguments.tokens, autocast)
        bits = "-" if math.isnan(result.bits_per_byte) else f"{result.bits_per_byte:.4f}"
        rows.append((trained.name, data, f"{result.tokens:,}", f"{result.loss:.4f}", f"{result.perplexity:,.2f}", bits))
    print(aligned(rows, left=2))


if __name__ == "__main__":
    with one_line_errors("evaluate"):
        main(sys.argv[1:])
