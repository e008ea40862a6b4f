"""From shards to batches. Every world size reads the same global stream; the step number alone gives the position."""

from __future__ import annotations

import bisect
import hashlib
import queue
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from data.shards import check_split, open_shard

_MARKED = 4096  # tokens at each end of a shard that its mark depends on


class TokenStream:
    """All shards of a split, sorted by file name, as one memory-mapped array of tokens."""

    def __init__(self, data_dir: Path | str, split: str) -> None:
        self.paths, manifest = check_split(data_dir, split)
        self.data_dir, self.split = Path(data_dir), split
        self.vocab_size: int | None = manifest.vocab_size if manifest else None
        self._shards = [open_shard(path) for path in self.paths]
        self._starts = [0]  # where each shard starts in the stream, and the end of the last
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        self.tokens: int = self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens [start, stop) as uint16, across shard borders."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"[{start}, {stop}) is outside a stream of {self.tokens} tokens")
        out = np.empty(stop - start, dtype=np.uint16)
        index, position = self._shard_at(start), start
        while position < stop:
            end = min(stop, self._starts[index + 1])
            first = self._starts[index]
            out[position - start : end - start] = self._shards[index][position - first : end - first]
            index, position = index + 1, end
        return out

    def marks(self) -> dict[str, str]:
        """What tells each shard from others, by file name: its number of tokens and a hash of its first and last ones."""
        marks = {}
        for path, shard in zip(self.paths, self._shards, strict=True):
            digest = hashlib.sha256(shard[:_MARKED].tobytes() + shard[-_MARKED:].tobytes()).hexdigest()
            marks[path.name] = f"{len(shard)} tokens, {digest[:16]}"
        return marks

    def locate(self, position: int) -> tuple[Path, int]:
        """The file that holds the token at `position` of the stream, and its index in that file."""
        index = self._shard_at(position)
        return self.paths[index], position - self._starts[index]

    def _shard_at(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1


class _Prefetch:
    """One batch for the background thread to prepare: a (2, rows, seq_len) host tensor, or an error."""

    def __init__(self, assemble: Callable[[int], Tensor], step: int) -> None:
        self.step = step
        self.assemble: Callable[[int], Tensor] | None = assemble
        self.done = threading.Event()
        self.host: Tensor | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        assert self.assemble is not None
        try:
            self.host = self.assemble(self.step)
        except BaseException as error:
            self.error = error
        self.assemble = None  # breaks a cycle, so that an unused loader and its thread are freed at once
        self.done.set()

    def result(self) -> Tensor:
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.host is not None
        return self.host


def _serve(requests: queue.SimpleQueue[_Prefetch | None]) -> None:
    """The background thread. Between requests it keeps no reference to the loader, so the loader can be collected."""
    while (request := requests.get()) is not None:
        request.run()
        del request


class BatchLoader:
    """Batch k holds the sequences k·B to (k+1)·B-1. Sequence j is the T+1 tokens from j·T on: T inputs, and targets one later.

    With `shuffle_seed` the sequences come in one fixed random order. Rank r gets the r-th block of each batch, so all ranks
    together read the same batch for any number of ranks. While a step trains, a thread prepares the next batch.
    Raises UserError if the sizes do not fit the ranks or the model's vocabulary.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        shuffle_seed: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise UserError(f"batch size ({batch_size}) and sequence length ({seq_len}) must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if batch_size % world_size:
            raise UserError(
                f"a batch of {batch_size} sequences cannot be divided among {world_size} ranks; "
                f"choose a multiple of {world_size}"
            )
        if vocab_size is not None and stream.vocab_size is not None and stream.vocab_size > vocab_size:
            raise UserError(
                f"{stream.data_dir}: its vocabulary of {stream.vocab_size} does not fit the model's "
                f"{vocab_size}; use a model or data with another vocabulary"
            )
        self.stream, self.batch_size, self.seq_len = stream, batch_size, seq_len
        self.rank, self.world_size, self.vocab_size = rank, world_size, vocab_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # the thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.sequences: int = (stream.tokens - 1) // seq_len
        self.steps: int = self.sequences // batch_size
        self._order: np.ndarray | None = None
        if shuffle_seed is not None:
            self._order = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(self.sequences)
        self._next: _Prefetch | None = None
        self._closed = False
        self._requests: queue.SimpleQueue[_Prefetch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._requests,), name="batch-prefetch", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, self._requests.put, None)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets of a step, each (batch_size / world_size, seq_len) int64 on the device.

        Raises UserError if the data ends before this step, or holds a token outside the vocabulary.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        if not 0 <= step < self.steps:
            raise UserError(
                f"step {step} is outside the data: {self.stream.data_dir} has {self.stream.tokens} "
                f"{self.stream.split} tokens, enough for {self.steps} steps of {self.batch_size} × "
                f"{self.seq_len}; get more shards or train fewer steps"
            )
        request, self._next = self._next, None
        if request is None or request.step != step:
            host = self._assemble(step)  # the first step, or one out of order
        else:
            host = request.result()
        if step + 1 < self.steps:
            self._next = _Prefetch(self._assemble, step + 1)
            self._requests.put(self._next)
        # Each batch has a new pinned buffer. torch's allocator reuses its memory only after the copy has ended, so the
        # buffer may be dropped here while the copy is in flight.
        inputs, targets = host.to(self.device, non_blocking=host.is_pinned())
        return inputs, targets

    def _assemble(self, step: int) -> Tensor:
        """This rank's (inputs, targets) of a step on the host, pinned if they go to CUDA."""
        rows = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * rows
        sequences = range(first, first + rows) if self._order is None else self._order[first : first + rows]
        host = np.empty((2, rows, self.seq_len), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            start = int(sequence) * self.seq_len
            tokens = self.stream.read(start, start + self.seq_len + 1)
            if self.vocab_size is not None and tokens.max() >= self.vocab_size:
                at = int(np.argmax(tokens >= self.vocab_size))
                path, index = self.stream.locate(start + at)
                raise UserError(
                    f"{path}: token {tokens[at]} (number {index} of the shard, needed at step {step}) is "
                    f"outside the model's vocabulary of {self.vocab_size}"
                )
            host[0, row], host[1, row] = tokens[:-1], tokens[1:]
        tensor = torch.from_numpy(host)
        if self.device.type != "cuda":
            return tensor
        with torch.cuda.device(self.device):  # otherwise each rank's thread opens a context on the first GPU
            return tensor.pin_memory()

    def close(self) -> None:
        """Stop the background thread; does nothing the second time."""
        self._closed = True
        self._next = None
        self._stop()
        self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
