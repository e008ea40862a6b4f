"""Common uses of torch's optimizers, with each of ours."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optim import Gluon, MuonMVR
from tests.helpers.optimizers import (
    CLASSES,
    VARIANTS,
    Net,
    Script,
    all_classes,
    closure_of,
    distance,
    gaussian,
    make,
    same,
    same_path,
    train,
    variants,
    weights,
)

bare = pytest.mark.parametrize("variant", ["gluon", "single_batch", "muon_mvr"])

# ---- averages of the weights ------------------------------------------------------------------------------------------------


@all_classes
def test_stochastic_weight_averaging(variant):
    net = Net()
    optimizer = make(variant, net)
    averaged = swa_utils.AveragedModel(net)
    path = []
    for k in range(4):
        optimizer.step(closure_of(net, k))
        averaged.update_parameters(net)
        path.append(weights(net))
    mean = [torch.stack(ws).mean(0) for ws in zip(*path, strict=True)]
    assert distance(averaged.module.parameters(), mean) < 1e-13


@all_classes
def test_exponential_moving_average(variant):
    net = Net()
    optimizer = make(variant, net)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    expected = None
    for k in range(4):
        optimizer.step(closure_of(net, k))
        averaged.update_parameters(net)
        now = weights(net)
        expected = now if expected is None else [0.9 * e + 0.1 * w for e, w in zip(expected, now, strict=True)]
    assert distance(averaged.module.parameters(), expected) < 1e-12


# ---- loss scaling -----------------------------------------------------------------------------------------------------------


@bare
def test_grad_scaler(variant):
    """A scale that is a power of two changes no bit. A step with infinities is skipped and does not change the momentum."""
    plain, scaled = Net(), Net()
    first, second = make(variant, plain), make(variant, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for k in range(6):
        overflows = k in (0, 3)
        loss = scaled(torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(k)))
        scaler.scale(loss).backward()
        if overflows:
            scaled.first.weight.grad[0, 0] = torch.inf
        before, state = weights(scaled), copy.deepcopy(second.state_dict())
        scaler.step(second)
        scaler.update()
        if overflows:
            assert same(before, weights(scaled)) and second.updates == first.updates
            for i, s in second.state_dict()["state"].items():
                assert all(torch.equal(v, state["state"][i][n]) for n, v in s.items() if isinstance(v, Tensor))
        else:
            first.step(closure_of(plain, k))
        second.zero_grad()
    assert scaler.get_scale() == 2.0**8
    assert same(weights(plain), weights(scaled)) and second.updates == 4


@bare
def test_grad_scaler_and_clipping(variant):
    """After scaler.unscale_ and clip_grad_norm_ the step takes the clipped gradients."""
    plain, scaled = Net(), Net()
    first, second = make(variant, plain), make(variant, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    for k in range(3):
        closure_of(plain, k)()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        first.step()
        scaler.scale(closure_of_loss(scaled, k)).backward()
        scaler.unscale_(second)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.01)
        scaler.step(second)
        scaler.update()
    assert same(weights(plain), weights(scaled))


def closure_of_loss(net, k):
    return net(torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(k)))


# ---- hooks and the profiler -------------------------------------------------------------------------------------------------


@all_classes
def test_step_hooks_run_once_a_step(variant):
    net = Net()
    optimizer = make(variant, net)
    called = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append(("pre", o is optimizer, len(args))))
    optimizer.register_step_post_hook(lambda o, args, kwargs: called.append(("post", o is optimizer, len(args))))
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: called.append("global pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: called.append("global post")),
    ]
    try:
        for k in range(3):
            called.clear()
            optimizer.step(closure_of(net, k))
            assert called == ["global pre", ("pre", True, 2), ("post", True, 2), "global post"]
        called.clear()
        optimizer.flush()
        assert not called
    finally:
        for handle in handles:
            handle.remove()


@all_classes
def test_a_pre_hook_may_replace_the_closure(variant):
    net, twin = Net(), Net()
    optimizer, expected = make(variant, net), make(variant, twin)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure_of(net, 5)), kwargs))
    optimizer.step(closure_of(net, 0))
    expected.step(closure_of(twin, 5))
    optimizer.flush()
    expected.flush()
    assert same(weights(net), weights(twin))


@pytest.mark.parametrize("prepend", [False, True])
@all_classes
def test_hooks_of_loading(variant, prepend):
    """The state that a pre-hook returns is loaded, buffers included, before a post-hook runs."""
    net, other = Net(), Net()
    optimizer, loaded = make(variant, net), make(variant, other)
    train(net, optimizer, range(2))
    seen = []

    def double(o, state_dict):
        state = {i: {n: 2 * v if n == "momentum_buffer" else v for n, v in s.items()} for i, s in state_dict["state"].items()}
        groups = [group | {"lr": 0.125} for group in state_dict["param_groups"]]
        return state_dict | {"state": state, "param_groups": groups}

    loaded.register_load_state_dict_pre_hook(double, prepend=prepend)
    loaded.register_load_state_dict_post_hook(lambda o: seen.append(o.state[other.gain]["momentum_buffer"].clone()))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    loaded.load_state_dict(state)
    assert torch.equal(seen[0], 2 * optimizer.state[net.gain]["momentum_buffer"])
    assert torch.equal(loaded.state[other.gain]["momentum_buffer"], seen[0])
    assert {group["lr"] for group in loaded.param_groups} == {0.125}
    assert all(
        torch.equal(v, state["state"][i][n]) for i, s in kept["state"].items() for n, v in s.items() if isinstance(v, Tensor)
    )
    assert len(loaded._optimizer_load_state_dict_pre_hooks) == 1, "loading leaves no hook of its own"


@all_classes
def test_hooks_of_saving(variant):
    optimizer = make(variant, Net())
    order = []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: state_dict | {"note": len(order)})
    assert optimizer.state_dict()["note"] == 1


@all_classes
def test_profiler_names(variant):
    net = Net()
    optimizer = make(variant, net)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure_of(net, 0))
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    name = type(optimizer).__name__
    assert counts[f"Optimizer.step#{name}.step"] == 1 and counts[f"Optimizer.zero_grad#{name}.zero_grad"] == 1


# ---- parameters -------------------------------------------------------------------------------------------------------------


@variants
def test_named_parameters(variant):
    """The names stay with the groups, also through a state_dict, and change nothing else."""
    nets = Net(), Net()
    plain = CLASSES[variant](nets[0].parameters(), norm="auto", view="convolution")
    named = CLASSES[variant](nets[1].named_parameters(), norm="auto", view="convolution")
    assert named.param_groups[0]["param_names"] == [name for name, _ in nets[1].named_parameters()]
    assert same_path(train(nets[0], plain, range(3)), train(nets[1], named, range(3)))
    state = named.state_dict()
    assert state["param_groups"][0]["param_names"][0] == "gain"
    other = CLASSES[variant](Net().named_parameters(), norm="auto", view="convolution")
    other.load_state_dict(state)
    assert other.param_groups[0]["param_names"] == named.param_groups[0]["param_names"]
    named.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))]})
    assert named.param_groups[1]["param_names"] == ["late"]
    with pytest.raises(ValueError, match="names"):
        named.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})


@all_classes
def test_groups_from_generators_and_single_tensors(variant):
    net = Net()
    for params in (net.parameters(), iter([{"params": net.parameters()}]), [{"params": p} for p in net.parameters()]):
        if variant == "muon_mvr":
            optimizer = MuonMVR(params)
        else:
            optimizer = VARIANTS[variant](params, norm="auto", view="convolution")
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters()))
        optimizer.step(closure_of(net, 0))


@all_classes
def test_late_groups(variant):
    """A layer that is added after some steps, as in fine-tuning, and a save after that."""
    net = Net()
    late = [net.second.weight, net.second.bias]
    early = [p for p in net.parameters() if not any(p is q for q in late)]
    build = (
        partial(MuonMVR, is_approx=True)
        if variant == "muon_mvr"
        else partial(VARIANTS[variant], norm="auto", view="convolution")
    )
    optimizer = build(early, lr=0.02)
    before = [p.detach().clone() for p in late]
    for k in range(2):
        optimizer.step(closure_of(net, k))
        net.zero_grad()
    assert same(before, late)
    optimizer.add_param_group({"params": late, "lr": 0.01})
    for k in range(2, 4):
        optimizer.step(closure_of(net, k))
    other = copy.deepcopy(net)
    fresh = build([p for p in other.parameters() if p.shape != (6, 8) and p is not other.second.bias], lr=0.02)
    fresh.add_param_group({"params": [other.second.weight, other.second.bias], "lr": 0.01})
    fresh.load_state_dict(optimizer.state_dict())
    assert same_path(train(other, fresh, range(4, 6)), train(net, optimizer, range(4, 6)))
    assert not any(torch.equal(a, b) for a, b in zip(before, late, strict=True))
    assert {g["updates"] for g in optimizer.param_groups} == {6}


def in_layout(shape, layout):
    w = gaussian(*shape)
    if layout == "channels_last":
        return w.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return w.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return torch.stack([w, w], -1)[..., 0]
    return w


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
@pytest.mark.parametrize("norm", ["spectral", "sign", "colnorm", "frobenius", "adamw"])
@variants
def test_layouts(variant, norm, layout):
    """Weights that are not contiguous move like contiguous ones and keep their layout."""
    shape = (4, 3, 2, 2) if layout == "channels_last" else (4, 6)
    ends = []
    for kind in ("contiguous", layout):
        p = nn.Parameter(in_layout(shape, kind))
        stride = p.stride()
        optimizer = VARIANTS[variant]([p], norm=norm)
        for k in range(3):
            optimizer.step(Script([p], *[[gaussian(*shape, seed=k + i)] for i in range(2)]))
        optimizer.flush()
        assert p.stride() == stride
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        ends.append(p.detach().clone())
        assert kind == "contiguous" or not p.is_contiguous()
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch ties the gradient's dtype to the parameter's")
@all_classes
def test_gradients_of_another_dtype(variant):
    """float32 gradients of bfloat16 parameters reach the float32 momentum unrounded."""
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    g = torch.tensor([[1.0, 1.0 + 2**-12], [0.5, -0.25]]) / 4
    optimizer = MuonMVR([p], gamma=0.0) if variant == "muon_mvr" else VARIANTS[variant]([p])

    def closure():
        p.grad = g.clone()

    optimizer.step(closure)
    share = 1 - 0.95 if variant == "muon_mvr" else 1 - 0.3 if variant == "previous_batch" else 1.0
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], share * g, rtol=1e-6)


@all_classes
def test_frozen_parameters(variant):
    """With requires_grad=False for a while, the parameter does not move."""
    net = Net()
    optimizer = make(variant, net, weight_decay=0.5)
    train(net, optimizer, range(2))
    if variant == "previous_batch":  # its last step has already folded a comparison, which moves it once more
        net.first.weight.requires_grad_(False)
        train(net, optimizer, [2])
    net.first.weight.requires_grad_(False)
    before = net.first.weight.detach().clone()
    train(net, optimizer, range(2, 4))
    assert torch.equal(net.first.weight, before)
    net.first.weight.requires_grad_(True)
    train(net, optimizer, range(4, 6))
    assert not torch.equal(net.first.weight, before)


@all_classes
def test_losses_fall(variant):
    """Each class reduces a simple loss by a large factor."""
    p, bias = nn.Parameter(gaussian(4, 3)), nn.Parameter(gaussian(4))
    x = gaussian(3, seed=3)
    params = [p, bias]
    optimizer = MuonMVR(params, lr=0.1) if variant == "muon_mvr" else VARIANTS[variant](params, lr=0.1, norm="auto")

    def closure():
        optimizer.zero_grad()
        loss = (p @ x + bias).square().sum()
        loss.backward()
        return loss.detach()

    losses = []
    for k in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - k / 60)
        losses.append(float(optimizer.step(closure)))
    assert losses[-1] < 0.02 * losses[0]


# ---- objects ----------------------------------------------------------------------------------------------------------------


@all_classes
def test_no_reference_cycles(variant):
    """An optimizer and its buffers are freed with the last reference, and a step leaves nothing for the collector."""
    net = Net()
    optimizer = make(variant, net)
    closure = closure_of(net, 0)
    optimizer.step(closure)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(2):
            optimizer.step(closure)
        optimizer.flush()
        optimizer.state_dict()
        assert gc.collect() == 0
        alive = weakref.ref(optimizer), weakref.ref(optimizer.state[net.gain]["momentum_buffer"])
        del optimizer
        assert [r() for r in alive] == [None, None]
    finally:
        gc.enable()
        gc.unfreeze()


@all_classes
def test_it_can_be_printed(variant):
    text = repr(make(variant, Net()))
    assert text.startswith(("Gluon", "SingleBatchMVR", "PreviousBatchMVR", "MuonMVR")) and "lr: 0.02" in text


def test_a_subclass_keeps_its_name_and_options():
    class Mine(Gluon):
        """A subclass without changes."""

    net, twin = Net(), Net()
    assert same_path(train(net, Mine(net.groups(), lr=0.02), range(3)), train(twin, Gluon(twin.groups(), lr=0.02), range(3)))
