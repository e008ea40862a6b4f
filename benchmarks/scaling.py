"""A small model of a step of GPT-124M on 1 to 1,024 GPUs: FLOPs, bytes and latency. No GPU is needed, and none was measured.

    python -m benchmarks.scaling

`messages` gives the exact bytes of the optimizer's exchange; a test compares them with the counts of torch's fake process
group. The times are estimates from these bytes and the figures in `Machine`.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch

from common.errors import one_line_errors
from common.tables import markdown
from model import GPT, GPTConfig
from optim import buckets

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Gradients a step.
PASSES = {"Gluon": 1, "MVR-1, -2, -3": 2}


@dataclass(frozen=True)
class Machine:
    """H100 SXM nodes: figures of data sheets, and the assumed shares of them. In FLOP/s, bytes/s and seconds."""

    flops: float = 989e12  # dense bfloat16
    share_of_gradients: float = 0.45
    share_of_polar: float = 0.6
    gpus_of_node: int = 8
    within: float = 350e9  # a collective's bandwidth over NVLink
    across: float = 300e9  # and over eight 400 Gbit/s adapters per node
    hop_within: float = 2e-6
    hop_across: float = 6e-6
    launch: float = 5e-6


@functools.cache
def model_of(config: GPTConfig) -> GPT:
    """A model without data."""
    with torch.device("meta"):
        return GPT(config)


def shapes(config: GPTConfig) -> tuple[Counter[tuple[int, int]], tuple[int, int]]:
    """The matrices of the blocks, up to transposition, and the embedding."""
    blocks = Counter((min(p.shape), max(p.shape)) for p in model_of(config).blocks.parameters())
    return blocks, (config.vocab_size, config.d_model)


def messages(config: GPTConfig, world: int, size: int) -> list[int]:
    """Bytes that each rank sends in a step, for each all-gather: one per bucket, each rank's part padded to the largest.

    The blocks have the spectral norm, the embedding the sign norm. `size`: bytes per entry of a spectral direction; a sign
    takes one. Each piece carries a flag.
    """
    if world == 1:
        return []
    blocks, (vocabulary, width) = shapes(config)
    sent = []
    for (m, k), count in blocks.items():
        most = max(1, buckets.BUCKET_ELEMENTS // (m * k))
        for first in range(0, count, most):
            pieces = math.ceil(min(most, count - first) / world)
            sent.append(pieces * (m * k + 1) * size)
    return [*sent, math.ceil(vocabulary / world) * width + 1]


def polar_flops(config: GPTConfig, world: int) -> float:
    """FLOPs of the rank with the most matrices: five iterations of three products."""
    blocks, _ = shapes(config)
    return sum(math.ceil(count / world) * 5 * (4 * m * m * k + 2 * m**3) for (m, k), count in blocks.items())


def all_gather_seconds(sent: int, world: int, machine: Machine) -> float:
    """A ring: each rank receives the parts of the others, over world - 1 hops of the slowest link."""
    inside = world <= machine.gpus_of_node
    hop, bandwidth = (machine.hop_within, machine.within) if inside else (machine.hop_across, machine.across)
    return (world - 1) * (sent / bandwidth + hop)


def all_reduce_seconds(size: int, world: int, machine: Machine) -> float:
    """A reduce-scatter and an all-gather. Across nodes the latency is that of a tree, which NCCL chooses there."""
    inside = world <= machine.gpus_of_node
    bandwidth = machine.within if inside else machine.across
    latency = (world - 1) * machine.hop_within if inside else 2 * math.log2(world) * machine.hop_across
    return 2 * (world - 1) / world * size / bandwidth + 2 * latency


def step_seconds(
    config: GPTConfig, sequences: float, world: int, passes: int, group: int, machine: Machine = Machine()
) -> dict[str, float]:
    """Seconds of each part of a step, from the sequences per GPU. `group`: the number of ranks that share the optimizer's work.

    The reduction of gradients overlaps with the backward pass; the exchange overlaps with nothing.
    """
    model = model_of(config)
    tokens = sequences * config.seq_len
    parameters = sum(p.numel() for p in model.parameters())
    compute = tokens * model.flops_per_token(config.seq_len) / (machine.flops * machine.share_of_gradients)
    reduce = all_reduce_seconds(4 * parameters, world, machine) if world > 1 else 0.0
    kernels = 25 * len(shapes(config)[0])
    return {
        "gradients": passes * compute,
        "reduction": passes * max(0.0, reduce - compute * 2 / 3),
        "polar": polar_flops(config, group) / (machine.flops * machine.share_of_polar) + kernels * machine.launch,
        "exchange": sum(all_gather_seconds(sent, group, machine) for sent in messages(config, group, 2)),
    }


def exchange_table(config: GPTConfig) -> str:
    """The cost of the exchange by the number of ranks that share the work. The bytes are exact."""
    rows = [["ranks", "all-gathers", "MB sent by a rank", "MB received", "of it padding", "exchange, ms", "polar factors, ms"]]
    blocks, (vocabulary, width) = shapes(config)
    useful = sum(count * m * k * 2 for (m, k), count in blocks.items()) + vocabulary * width
    for ranks in WORLDS:
        sent = messages(config, ranks, 2)
        got = ranks * sum(sent)
        parts = step_seconds(config, 1, ranks, 1, ranks)
        padding = f"{1 - useful / got:.0%}" if got else "-"
        milliseconds = [f"{parts[name] * 1e3:.2f}" for name in ("exchange", "polar")]
        rows.append([str(ranks), str(len(sent)), f"{sum(sent) / 1e6:.2f}", f"{got / 1e6:,.0f}", padding, *milliseconds])
    return markdown(rows)


def step_table(config: GPTConfig, head: str, sequences: dict[int, float]) -> str:
    """Milliseconds of a step for each number of GPUs, and the share that gradients take."""
    kinds = [(name, passes, nodes) for nodes in (False, True) for name, passes in PASSES.items()]
    rows = [["GPUs", head, *(name + (", by nodes" if nodes else "") for name, _, nodes in kinds)]]
    for world, each in sequences.items():
        cells = []
        for _, passes, nodes in kinds:
            group = min(world, Machine().gpus_of_node) if nodes else world
            parts = step_seconds(config, each, world, passes, group)
            whole = sum(parts.values())
            cells.append(f"{whole * 1e3:.1f} ({parts['gradients'] / whole:.0%})")
        rows.append([str(world), f"{each:g}", *cells])
    return markdown(rows)


def tables() -> list[str]:
    """Tables for GPT-124M: the exchange, steps of 512 sequences in total, steps of 8 sequences per GPU."""
    config = GPTConfig()
    fixed = {world: 512 / world for world in WORLDS if world <= 512}
    return [
        exchange_table(config),
        step_table(config, "sequences a GPU, 512 in all", fixed),
        step_table(config, "sequences a GPU", dict.fromkeys(WORLDS, 8)),
    ]


if __name__ == "__main__":
    with one_line_errors("benchmarks.scaling"):
        print("\n".join(tables()))
