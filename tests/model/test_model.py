"""The reference GPT-124M, and the cross-entropy that never holds all logits."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, Cache, GPTConfig, linear_cross_entropy, plain_attention, relu_squared, rotary_table, rotate

SMALL = GPTConfig(vocab_size=61, n_layer=2, n_head=2, d_model=32, seq_len=16)


def small(seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(seed)
    return GPT(SMALL).to(dtype)


def test_the_reference_model_has_its_123_568_128_parameters():
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in GPT(GPTConfig()).parameters()]
    assert sum(math.prod(s) for s in shapes) == 123_568_128
    assert shapes.count((768, 768)) == 48 and shapes.count((3072, 768)) == 12 and shapes.count((768, 3072)) == 12
    assert shapes.count((50304, 768)) == 1 and len(shapes) == 73


def test_initial_weights():
    gpt = GPT(GPTConfig(vocab_size=100, n_layer=2, n_head=2, d_model=64, seq_len=8))
    for name, w in gpt.named_parameters():
        if name.endswith(("attention.o.weight", "mlp.proj.weight")):
            assert not w.any(), name
        else:
            w, bound = w.detach(), 1 / math.sqrt(w.size(1))
            assert bound * 0.95 < w.abs().max() <= bound, name
            assert w.std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_at_the_start_the_blocks_get_no_gradient():
    gpt = small()
    idx = torch.randint(61, (2, 16))
    gpt(idx, idx.roll(-1, 1)).backward()
    for name, w in gpt.blocks.named_parameters():
        moves = name.endswith(("attention.o.weight", "mlp.proj.weight"))
        assert bool(w.grad.any()) == moves, name


def test_at_the_start_the_tied_head_predicts_its_input():
    """So the loss on text starts far above ln V: at 16 for the reference model."""
    gpt = small()
    idx = torch.randint(61, (2, 16))
    assert torch.equal(gpt(idx).argmax(-1), idx)
    assert gpt(idx, idx.roll(-1, 1)) > math.log(61)


def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch):
    monkeypatch.setattr(model_module, "_chunk_rows", lambda *_: 5)  # of 32
    gpt = small()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, targets = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    loss = gpt(idx, targets)
    loss.backward()
    chunked = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    plain = F.cross_entropy(gpt(idx).flatten(0, 1), targets.flatten())
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-14)
    for a, p in zip(chunked, gpt.parameters(), strict=True):
        assert (a - p.grad).norm() < 1e-12 * p.grad.norm()
    with torch.no_grad():
        assert gpt(idx, targets).item() == pytest.approx(plain.item(), rel=1e-14)


def test_cross_entropy_gradient_numerically(monkeypatch):
    monkeypatch.setattr(model_module, "_chunk_rows", lambda *_: 3)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    assert torch.autograd.gradcheck(lambda x, w: 3 * linear_cross_entropy(x, w, targets), (x, w))


def test_second_derivatives_are_refused_and_not_wrong():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 5, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for y in (relu_squared(x).sum(), linear_cross_entropy(x, w, torch.randint(11, (7,)))):
        (gradient,) = torch.autograd.grad(y * scale, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that is created."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_all_logits_never_exist_at_once():
    rows, vocabulary = 2048, 8192
    x = torch.randn(rows, 8, requires_grad=True)
    w = torch.randn(vocabulary, 8, requires_grad=True)
    with Watch() as watch:
        linear_cross_entropy(x, w, torch.randint(vocabulary, (rows,))).backward()
    assert watch.largest == rows * vocabulary / 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_compiled_head_needs_no_scatter_and_gives_the_same_bits(dtype):
    x = torch.randn(700, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(9000, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(9000, (700,))
    called = set()

    def backend(module, inputs):
        graphs = [m.graph for m in module.modules() if isinstance(m, torch.fx.GraphModule)]
        called.update(str(node.target) for graph in graphs for node in graph.nodes)
        return module.forward

    found = []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, backend=backend, fullgraph=True)):
        loss = function(x, w, targets)
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert "exp_" in called and not any("scatter" in name for name in called)
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_chunks_have_full_tiles_and_similar_sizes():
    for rows, vocabulary in [(1, 61), (2048, 257), (2048, 50304), (32768, 50304), (65536, 50304), (4000, 128256)]:
        for device in ("cuda", "cpu", "mps"):
            size = model_module._chunk_rows(rows, vocabulary, device, False)
            larger = model_module._chunk_rows(rows, vocabulary, device, True)
            assert size % 128 == larger % 128 == 0 and 0 < size <= larger
            assert size <= 512 or size * vocabulary <= 2**27 + 128 * vocabulary
            assert -(-rows // size) * size < rows + 128 * -(-rows // size), "no short last chunk"
    assert model_module._chunk_rows(32768, 50304, "cuda", True) == 8192


def test_autocast_gives_a_float32_loss_near_the_exact_one():
    gpt = small(dtype=torch.float32)
    idx, targets = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    exact = gpt(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and exact.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 for p in gpt.parameters())


def test_plain_attention_is_torchs():
    qkv = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours, torchs = plain_attention(*qkv), F.scaled_dot_product_attention(*qkv, is_causal=True)
    assert torch.allclose(ours, torchs, rtol=0, atol=1e-14)
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, qkv, direction), torch.autograd.grad(torchs, qkv, direction), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_bfloat16_gradients_are_as_exact_with_either_attention(monkeypatch):
    gpt = small(dtype=torch.float32)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(61, (4, 16))

    def gradient(autocast):
        gpt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gpt(idx, idx.roll(-1, 1)).backward()
        return torch.cat([p.grad.flatten() for p in gpt.parameters()])

    exact, ours = gradient(False), gradient(True)
    monkeypatch.setattr(
        model_module, "plain_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    torchs = gradient(True)
    assert not torch.equal(ours, torchs)
    assert (ours - exact).norm() < 1.5 * (torchs - exact).norm() < 0.1 * exact.norm()


def test_no_position_sees_a_later_one():
    gpt = small()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(61, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % 61
    a, b = gpt(idx), gpt(changed)
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-12) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)


def test_rotary_scores_depend_only_on_the_distance():
    cos, sin = (t.double() for t in rotary_table(16, 8))
    q, k = torch.randn(8, dtype=torch.float64).expand(1, 1, 16, 8), torch.randn(8, dtype=torch.float64).expand(1, 1, 16, 8)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0]
    for offset in range(-15, 16):
        diagonal = scores.diagonal(offset)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5  # the table is float32


def test_sequences_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        small()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 1, 7, 2)])
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(pieces, dtype):
    gpt = small(dtype=dtype)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, cache = torch.randint(61, (3, 16)), Cache(gpt.config)
    whole, parts = gpt(idx), [gpt(part, cache=cache) for part in idx.split(pieces, 1)]
    assert cache.length == 16 and whole.std() > 0.3
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    with pytest.raises(ValueError, match="at most 16 tokens, got 17"):
        gpt(idx[:, :1], cache=cache)
