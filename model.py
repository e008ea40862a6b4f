"""The GPT of Scion's and Gluon's NanoGPT experiments: 124M parameters, no biases, no parameters in its norms.

Rotary positions, RMS-normalised queries and keys, squared ReLU, tied embedding and head. Shapes in names: B sequences, T
tokens, D width, H heads, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `seq_len` is the longest sequence; d_model must be a multiple of 2·n_head."""

    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    d_model: int = 768
    seq_len: int = 1024


def rms_norm(x: Tensor) -> Tensor:
    """x divided by its root mean square along the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def relu_squared(x: Tensor) -> Tensor:
    """(√2·relu(x))², which keeps the variance of a normal input."""
    return 2 * F.relu(x).square() if torch.compiler.is_compiling() else _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    """Five elementwise passes, forward and backward; the plain formula with autograd takes nine."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: ANN001
        root = F.relu(x)
        ctx.save_for_backward(root)
        return (root * root).mul_(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: ANN001
        (root,) = ctx.saved_tensors
        return (grad * root).mul_(4)


class Attention(nn.Module):
    """Causal self-attention with rotary positions on normalised queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, past: "LayerCache | None" = None) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            linear(x_BTD).view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(rms_norm(q), cos, sin), rotate(rms_norm(k), cos, sin)
        mask = None
        if past is not None:
            k, v = past.append(k, v)
            mask = torch.ones(T, k.size(2), dtype=torch.bool, device=k.device).tril(k.size(2) - T)
        if mask is None and q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512:
            y = plain_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two layers, D to 4·D to D, with relu² scaled to keep the variance."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model, bias=False)
        self.proj = nn.Linear(4 * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(relu_squared(self.fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: "LayerCache | None" = None) -> Tensor:
        x = x + self.attention(rms_norm(x), cos, sin, past)
        return x + self.mlp(rms_norm(x))


class LayerCache:
    """The keys and values (B, H, T, d) of one layer for the tokens read so far; d = D/H."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of the next tokens. Returns those of all tokens."""
        if self.length == 0:
            shape = (*k.shape[:2], self.capacity, k.size(3))
            self._k, self._v = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.size(2)
        self._k[:, :, start : self.length] = k
        self._v[:, :, start : self.length] = v
        return self._k[:, :, : self.length], self._v[:, :, : self.length]


class Cache:
    """What a model remembers of the tokens that it has read, so that generation computes each token once.

    `model(idx, cache=Cache(model.config))` reads idx; the next call with this cache takes the tokens that follow. It is for
    inference (`torch.no_grad`) and holds `seq_len` tokens at most; `length` counts them.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.layers = [LayerCache(config.seq_len) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        return self.layers[0].length


class GPT(nn.Module):
    """`model(idx, targets)`, both (B, T) int64, is the mean cross-entropy; without targets, the logits (B, T, V)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.d_model % (2 * config.n_head):
            raise ValueError(f"d_model must be a multiple of 2·n_head = {2 * config.n_head}, got {config.d_model}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        cos, sin = rotary_table(config.seq_len, config.d_model // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1/√d_in. The output projections are zero, so that every block starts as the identity."""
        for weight in self.parameters():
            bound = 1 / math.sqrt(weight.size(1))
            weight.uniform_(-bound, bound)
        for block in self.blocks:
            block.attention.o.weight.zero_()
            block.mlp.proj.weight.zero_()

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Mean cross-entropy over all targets (B, T); without targets, logits (B, T, V). Both are at least float32.

        With a cache, idx (B, T) follows the tokens that the cache holds, and is added to them.
        Raises ValueError if there are more tokens than `seq_len`.
        """
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        if self.cos.size(0) < end:
            raise ValueError(f"the model takes at most {self.cos.size(0)} tokens, got {end}")
        cos, sin = self.cos[start:end], self.sin[start:end]
        x = self.embedding(idx)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache.layers[i] if cache is not None else None)
        x = rms_norm(x)
        if targets is None:
            logits = F.linear(x, self.embedding.weight)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        return linear_cross_entropy(x.flatten(0, 1), self.embedding.weight, targets.flatten())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs of a token: 6 per parameter and 12·L·D·T for attention (PaLM, appendix B)."""
        parameters = sum(p.numel() for p in self.parameters())
        return 6 * parameters + 12 * self.config.n_layer * self.config.d_model * seq_len


def rotary_table(length: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (length, dim/2) of position times frequency."""
    frequency = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+d/2}) by their position's angles."""
    a, b = x_BHTd.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x_BHTd)


def plain_attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Causal attention that stores all scores. In bfloat16 on a CPU, a step is a fifth faster than with the fused kernel."""
    q, k, v = (x.flatten(0, 1) for x in (q_BHTd, k_BHTd, v_BHTd))
    later = torch.full((q.size(1), q.size(1)), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later, q, k.mT, alpha=q.size(-1) ** -0.5)
    return (scores.softmax(dim=-1) @ v).view_as(q_BHTd)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x·Wᵀ, a chunk of rows at a time, so that all N·V logits never exist at once."""
    dtype = x_ND.dtype
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
    with torch.autocast(x_ND.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x_ND.to(dtype), weight_VD.to(dtype), targets_N, torch.is_grad_enabled())


def _chunk_rows(rows: int, vocabulary: int, device: str, compiled: bool) -> int:
    """Rows of a chunk: equal shares, in multiples of 128 so that products have full tiles.

    If compiled, a chunk's float32 logits never reach memory, so a chunk may be larger, and fewer chunks read the weight and its
    gradient less often. On a CPU a small chunk's logits stay in the cache, but products of few rows are slow.
    """
    most_logits = {"cuda": 2**29 if compiled else 2**27, "cpu": 2**22}.get(device, 2**24)
    most_rows = max(512, most_logits // vocabulary)
    chunks = -(-rows // most_rows)
    return -(-rows // (128 * chunks)) * 128


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:  # noqa: ANN001
        (N, V), compiled = (x.size(0), weight.size(0)), torch.compiler.is_compiling()
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_gradient else None
        rows = _chunk_rows(N, V, x.device.type, compiled)
        for start in range(0, N, rows):
            x_c, target_c = x[start : start + rows], targets[start : start + rows]
            logits = (x_c @ weight.T).to(wide)
            largest = logits.amax(dim=1, keepdim=True)
            exp = logits.sub_(largest).exp_()
            z = exp.sum(dim=1, keepdim=True)
            # Computes the target's logit again. Reading it from the logits would keep a compiled chunk's logits in memory.
            loss += (z.log() + largest).sum() - (x_c.to(wide) * weight[target_c]).sum()
            if needs_gradient:
                probability = exp.div_(z)
                if compiled:  # fuses without atomics; in eager mode it would pass over all logits
                    error = probability - (torch.arange(V, device=x.device) == target_c.unsqueeze(1)).to(wide)
                else:
                    error = probability.scatter_add_(1, target_c.unsqueeze(1), torch.full_like(z, -1.0))
                error = error.div_(N).to(x.dtype)
                grad_x[start : start + rows] = error @ weight
                if wide == x.dtype:
                    grad_weight.addmm_(error.T, x_c)
                else:
                    grad_weight += error.T @ x_c
        if needs_gradient:
            ctx.save_for_backward(grad_x, grad_weight)
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN001
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), (grad_weight * grad_loss).to(grad_x.dtype), None, None
