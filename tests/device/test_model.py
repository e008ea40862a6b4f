"""The model on the device: compiled against eager, bfloat16 against float32, and a micro-batch that fits.

On a GPU it is GPT-124M, with as many sequences as the trainer's rule lets the card have. These tests share a file, so that
they never run at the same time.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from optim import GluonMVR3
from optim.polar import has_bfloat16_units
from tests.helpers.device import CUDA, DEVICE, SIZE, distance, filled, gradients, groups, limit, tokens
from training.config import Config
from training.inputs import micro_batch_size

pytestmark = limit

UNITS = has_bfloat16_units(DEVICE)
CONFIG = Config(
    vocab_size=SIZE.vocab_size, n_layer=SIZE.n_layer, n_head=SIZE.n_head, d_model=SIZE.d_model, seq_len=SIZE.seq_len,
)  # fmt: skip


def sequences(most: int) -> int:
    """What fits beside the weights, in float32."""
    return micro_batch_size(CONFIG, most, DEVICE, False)


def named_gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def empty_card():
    yield
    if CUDA:
        torch.cuda.empty_cache()


def test_the_compiled_model_agrees_with_the_eager_one():
    """One graph, compiled once, with the same loss and gradients."""
    torch._dynamo.reset()
    counters.clear()
    model, some = filled(SIZE), tokens(SIZE, sequences(8 if CUDA else 2))
    eager = gradients(model, some, UNITS)
    right = named_gradients(model)
    net = torch.compile(model, dynamic=False, backend="inductor" if CUDA else "aot_eager")
    for _ in range(3):
        loss = gradients(net, some, UNITS)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert distance(loss, eager) <= 2e-3
    worst = {name: distance(p.grad, right[name]) for name, p in model.named_parameters()}
    assert max(worst.values()) <= 3e-2, worst


@pytest.mark.skipif(CUDA and not UNITS, reason="the card has no bfloat16 units")
def test_bfloat16_agrees_with_float32():
    model, some = filled(SIZE), tokens(SIZE, sequences(8 if CUDA else 2))
    full = gradients(model, some)
    right = named_gradients(model)
    loss = gradients(model, some, True)
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert distance(loss, full) <= 6e-2
    worst = {name: distance(p.grad, right[name]) for name, p in model.named_parameters()}
    assert max(worst.values()) <= 6e-2, worst


def test_the_micro_batch_that_the_trainer_chooses_fits():
    """Beside the weights, the gradients and the two buffers of MVR-3."""
    micro = micro_batch_size(CONFIG, CONFIG.batch_size, DEVICE, UNITS)
    assert CONFIG.batch_size % micro == 0
    model, some = filled(SIZE), tokens(SIZE, micro)
    optimizer = GluonMVR3(groups(model), lr=1e-6)
    for _ in range(2):
        loss = optimizer.step(lambda: gradients(model, some, UNITS))  # out of memory is an error
    optimizer.flush()
    assert loss.isfinite()
