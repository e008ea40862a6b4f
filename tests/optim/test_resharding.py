"""State on other numbers of ranks: the full state, torch.distributed.checkpoint."""

import functools

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.helpers.parallel import (
    BUFFERS,
    LAYERWISE,
    STEPS,
    VARIANTS,
    alone,
    assert_same,
    buffer_bytes,
    optimizer_of,
    parallel_net,
    started,
    stopped_at_the_end,  # noqa: F401
    take_step,
    weights,
)

pytestmark = pytest.mark.slow
WORLDS = (1, 2, 3, 4)


def stop(kind: str, variant, steps: int) -> dict:
    """Train some steps. Returns the weights and the full state of the optimizer."""
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(steps):
        take_step(optimizer, model, k)
    names = [name for name, _ in net.named_parameters()]
    return {"weights": dict(zip(names, weights(net), strict=True)), "state": optimizer.full_state_dict()}


def go_on(variant, steps: int, saved: dict) -> dict:
    net, model = parallel_net("ddp")
    optimizer = optimizer_of(variant, net, decay=0.7)  # the loaded state has another
    net.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["state"])
    path = [weights(net)]
    for k in range(steps, STEPS):
        take_step(optimizer, model, k)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates, "bytes": buffer_bytes(optimizer)}


@functools.cache
def tail(variant, steps: int) -> dict:
    return {"path": alone(variant)["path"][steps:]}


@functools.cache
def stopped(kind: str, variant, steps: int, world: int) -> list[dict]:
    return started(world).run(stop, kind, variant, steps)


def assert_same_state(state: dict, expected: dict) -> None:
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for i, right in expected["state"].items():
        mine = state["state"][i]
        assert mine.keys() == right.keys()
        for name, value in right.items():
            if name in BUFFERS:
                assert mine[name].dtype == value.dtype and mine[name].shape == value.shape
                assert (mine[name] - value).norm() <= 1e-9 * value.norm(), (i, name)
            else:
                assert mine[name] == pytest.approx(value), (i, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rank_gets_the_full_state(variant):
    for steps in (0, 1, 3):
        expected = stop("ddp", variant, steps)["state"]
        for world in (2, 3, 4) if steps == 3 else (3,):
            for kind in ("ddp", "fsdp") if steps == 3 and world < 4 and variant in LAYERWISE else ("ddp",):
                for answer in stopped(kind, variant, steps, world):
                    assert_same_state(answer["state"], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_full_state_loads_on_any_number_of_ranks(variant):
    """Each rank takes the part that it owns."""
    for steps, saver, loaders in ((0, 2, (3,)), (1, 4, (1, 3)), (3, 3, WORLDS), (3, 1, (2, 3))):
        saved = stopped("ddp", variant, steps, saver)[-1]
        for world in loaders:
            answers = started(world).run(go_on, variant, steps, saved)
            assert_same(answers, tail(variant, steps))
            assert {a["updates"] for a in answers} == {STEPS}
            assert sum(a["bytes"] for a in answers) == alone(variant)["bytes"], "each momentum is kept once"


@pytest.mark.parametrize("variant", ["gluon", "mvr2", "mvr3"])
def test_state_of_fsdp_loads_under_ddp(variant):
    answers = started(2).run(go_on, variant, 3, stopped("fsdp", variant, 3, 3)[0])
    assert_same(answers, tail(variant, 3))


# torch.distributed.checkpoint


def save(kind: str, variant, steps: int, folder: str) -> None:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(steps):
        take_step(optimizer, model, k)
    weights_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights_state, "optim": state}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(kind: str, variant, steps: int, folder: str) -> dict:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net, decay=0.7)
    weights_state, state = get_state_dict(model, optimizer)
    state = {"model": weights_state, "optim": state}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    path = []
    for k in range(steps, STEPS):
        take_step(optimizer, model, k)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)], "updates": optimizer.updates, "bytes": buffer_bytes(optimizer)}


@pytest.mark.parametrize("steps, saver, loaders", [(0, 2, (3,)), (3, 3, (1, 2, 4)), (3, 1, (2,))])
@pytest.mark.parametrize("variant", ["gluon", "mvr1", "mvr2", "mvr3", "previous_batch"])
def test_distributed_checkpoint_of_fsdp_loads_anywhere(variant, steps, saver, loaders, tmp_path):
    started(saver).run(save, "fsdp", variant, steps, str(tmp_path))
    for loader in loaders:
        answers = started(loader).run(load, "fsdp", variant, steps, str(tmp_path))
        assert_same(answers, {"path": tail(variant, steps)["path"][1:]})
        assert {a["updates"] for a in answers} == {STEPS}
        assert sum(a["bytes"] for a in answers) == alone(variant)["bytes"]


@pytest.mark.parametrize("kinds", [("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "ddp")])
@pytest.mark.parametrize("variant", ["gluon", "mvr3"])
def test_distributed_checkpoint_of_ddp(variant, kinds, tmp_path):
    started(4).run(save, kinds[0], variant, 2, str(tmp_path))
    for world in (2, 4):
        answers = started(world).run(load, kinds[1], variant, 2, str(tmp_path))
        assert_same(answers, {"path": tail(variant, 2)["path"][1:]})
