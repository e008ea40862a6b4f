"""The plain loop that the benchmarks compare with: a GPT as in nanoGPT, all logits at once, `.backward()`, `.step()`.

It shares no code with model.py or optim/. It has LayerNorm, GELU, learned positions, q, k and v in one product, torch's fused
attention, `F.cross_entropy` of all logits, and a tied embedding and head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTConfig


class PlainBlock(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """`model(idx, targets)`, both (B, T) int64, is the mean cross-entropy."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config.d_model, config.n_head) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainLoop:
    """Training steps on these tokens (B, T+1) with AdamW, or with torch's Muon for the blocks' matrices."""

    def __init__(self, config: GPTConfig, tokens: Tensor, bfloat16: bool, muon: bool) -> None:
        torch.manual_seed(0)
        self.model, self.tokens = PlainGPT(config).to(tokens.device), tokens
        self.autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16)
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2] if muon else []
        rest = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=1e-3)]
        if muon:
            self.optimizers.append(torch.optim.Muon(matrices, lr=1e-3))

    def gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.autocast:
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
