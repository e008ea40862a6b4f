"""The data of a run, and the number of sequences in a forward pass."""

import torch

from common.errors import UserError
from data import sotu
from data.loader import BatchLoader, TokenStream
from data.shards import list_shards
from training.config import Config
from training.ranks import Ranks

# Bytes of activations that a layer keeps for its backward pass, per entry of its (tokens, width) input, in bfloat16: 1.02 GiB
# for 32 sequences of 1,024 tokens at width 768. Twice that in float32.
_BYTES_PER_ENTRY = 44
_CPU_SEQUENCES = 32

Identity = dict[str, dict[str, str]]  # split to the marks of its shards


def micro_batch_size(config: Config, rows: int, device: torch.device, bfloat16: bool) -> int:
    """Sequences per forward pass: the largest divisor of a rank's `rows` that `--micro-batch-size` allows.

    0 means as many as fit into the device's memory next to weights, gradients and momentum (at most 32 on a CPU).
    """
    most = config.micro_batch_size
    if most == 0 and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        parameters = config.vocab_size * config.d_model + 12 * config.n_layer * config.d_model**2
        fixed = 16 * parameters + 2**31  # weights, gradients, two buffers; logits of a chunk and the allocator's slack
        entries = config.n_layer * config.seq_len * config.d_model
        most = int(0.8 * (free - fixed)) // (_BYTES_PER_ENTRY * entries * (1 if bfloat16 else 2))
    elif most == 0:
        most = _CPU_SEQUENCES
    return max(m for m in range(1, max(1, min(rows, most)) + 1) if rows % m == 0)


def open_data(config: Config, ranks: Ranks) -> tuple[BatchLoader, TokenStream]:
    """The batches and the validation split. Raises UserError if the data do not fit the config."""
    if config.text and not list_shards(config.data_dir):
        sotu.prepare(config.data_dir)  # one process builds it; the others wait
    val_stream = TokenStream(config.data_dir, "val")
    loader = BatchLoader(
        TokenStream(config.data_dir, "train"), batch_size=config.batch_size, seq_len=config.seq_len, rank=ranks.rank,
        world_size=ranks.size, device=ranks.device, vocab_size=config.vocab_size,
        shuffle_seed=config.seed if config.shuffle else None,
    )  # fmt: skip
    check_tokens(config, loader, val_stream)
    return loader, val_stream


def identity(loader: BatchLoader, val_stream: TokenStream) -> Identity:
    """What tells the run's data from others: for each split the shards in their order, and a mark of each one's content."""
    return {stream.split: stream.marks() for stream in (loader.stream, val_stream)}


def check_tokens(config: Config, loader: BatchLoader, val_stream: TokenStream) -> None:
    """Raise UserError if there are too few tokens to train or validate, or if one of validation's is outside the vocabulary."""
    if config.steps > loader.steps:
        need = config.steps * config.batch_size * config.seq_len + 1
        raise UserError(
            f"{config.steps} steps need {need:,} tokens and {config.data_dir} has {loader.stream.tokens:,}: get more shards "
            f"(FineWeb: python -m data.fineweb --shards {-(-need // 100_000_000)}) or --steps {loader.steps}"
        )
    if not config.seq_len <= config.val_tokens < val_stream.tokens:
        raise UserError(
            f"val_tokens = {config.val_tokens:,} must be from one sequence ({config.seq_len}) to the {val_stream.tokens - 1:,} "
            f"tokens of {config.data_dir}'s validation shards; set --val-tokens"
        )
    tokens = val_stream.read(0, config.val_tokens + 1)
    if tokens.max() >= config.vocab_size:
        path, index = val_stream.locate(int(tokens.argmax()))
        raise UserError(
            f"{path}: token {tokens.max()} (number {index} of the shard) is outside the model's vocabulary "
            f"of {config.vocab_size}"
        )
