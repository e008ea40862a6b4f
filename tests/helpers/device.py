"""The best device that there is, and what the tests in tests/device share: sizes that fit it, a model, a watch on forks."""

import os
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import GPT, GPTConfig

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once, at the first product on the device
CUDA = torch.cuda.is_available()
CARDS = torch.cuda.device_count() if CUDA else 0
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
TOY = GPTConfig(257, 2, 2, 32, 32)
SIZE = GPTConfig() if CUDA else TOY
BATCH = 24  # sequences of a batch that ranks share
RANKS = max(n for n in (1, 2, 3, 4, 6, 8) if n <= (CARDS or 2))  # on all cards, or two on the CPU

# A card compiles for minutes. A thread ends a test that hangs inside CUDA, where no signal handler runs.
limit = pytest.mark.timeout(400 if CUDA else 200, method="thread" if CUDA else "signal")
only_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")

# The stacks of the forks of this process. A child that is forked after CUDA was asked for anything can't use CUDA, and this
# module has asked. Processes that are spawned, or forked by a server that never asked, are not in the list.
FORKS: list[str] = []
os.register_at_fork(before=lambda: FORKS.append("".join(traceback.format_stack(limit=15))))


def filled(config: GPTConfig, device: torch.device = DEVICE, dtype: torch.dtype = torch.float32) -> GPT:
    """A seeded model whose zero matrices are filled too, so that every gradient is tested."""
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():
        if not p.any():
            nn.init.uniform_(p, -(p.size(1) ** -0.5), p.size(1) ** -0.5)
    return model.to(device, dtype)


def groups(model: GPT) -> list[dict[str, Any]]:
    return [
        {"params": list(model.blocks.parameters()), "norm": "spectral", "radius": 2.0},
        {"params": [model.embedding.weight], "norm": "sign"},
    ]


def tokens(config: GPTConfig, sequences: int, seed: int = 0, device: torch.device = DEVICE) -> Tensor:
    """(sequences, seq_len + 1) tokens, the same on every device."""
    shape = (sequences, config.seq_len + 1)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(net: nn.Module, batch: Tensor, bfloat16: bool = False) -> Tensor:
    """One pass: leaves the gradients in .grad. Returns the loss."""
    net.zero_grad(set_to_none=True)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
        loss = net(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss.detach()


def distance(a: Tensor, b: Tensor) -> float:
    """The relative distance of a from b; NaN if one has a NaN."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()
