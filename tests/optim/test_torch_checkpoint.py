"""torch.distributed.checkpoint.state_dict gives and takes the whole state, and one rank's share cannot be taken for it."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from optim import Gluon
from tests.helpers.parallel import (
    STEPS,
    VARIANTS,
    alone,
    assert_same,
    optimizer_of,
    parallel_net,
    started,
    stopped_at_the_end,  # noqa: F401
    take_step,
    weights,
)

pytestmark = pytest.mark.slow
SOME = ["gluon", "mvr1", "mvr2", "mvr3", "previous_batch", "muon_previous_batch"]
DONE = 2  # steps before the state is saved


def trained(kind: str, variant: str):
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net)
    for k in range(DONE):
        take_step(optimizer, model, k)
    return net, model, optimizer


def rest(net, model, optimizer) -> dict:
    path = [weights(net)]
    for k in range(DONE, STEPS):
        take_step(optimizer, model, k)
        path.append(weights(net))
    optimizer.flush()
    return {"path": [*path, weights(net)]}


def expected(variant: str) -> dict:
    return {"path": alone(variant)["path"][DONE:]}


def options(broadcast: bool = False) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=broadcast)


def give(kind: str, variant: str) -> tuple[dict, dict]:
    _, model, optimizer = trained(kind, variant)
    return get_model_state_dict(model, options=options()), get_optimizer_state_dict(model, optimizer, options=options())


def take(kind: str, variant: str, whole: tuple[dict, dict], broadcast: bool) -> dict:
    net, model = parallel_net(kind)
    optimizer = optimizer_of(variant, net, decay=0.7)  # the state has another
    weights_state, state = whole if not broadcast or dist.get_rank() == 0 else ({}, {})
    how = options(broadcast)
    set_model_state_dict(model, weights_state, options=how)
    set_optimizer_state_dict(model, optimizer, state, options=how)
    return rest(net, model, optimizer)


@pytest.mark.parametrize("saver, loader, broadcast", [(2, 2, True), (2, 1, False), (1, 2, True), (1, 3, False), (4, 2, False)])
@pytest.mark.parametrize("variant", SOME)
def test_the_full_state_of_torchs_functions(variant, saver, loader, broadcast):
    whole = started(saver).run(give, "ddp", variant)[0]
    assert_same(started(loader).run(take, "ddp", variant, whole, broadcast), expected(variant))


@pytest.mark.parametrize("kinds, broadcast", [(("ddp", "fsdp"), True), (("fsdp", "ddp"), False), (("fsdp", "fsdp"), True)])
@pytest.mark.parametrize("variant", ["gluon", "mvr3"])
def test_the_full_state_moves_between_ddp_and_fsdp(variant, kinds, broadcast):
    whole = started(2).run(give, kinds[0], variant)[0]
    assert_same(started(2).run(take, kinds[1], variant, whole, broadcast), expected(variant))


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_flat(variant: str, folder: str) -> None:
    _, model, optimizer = trained("ddp", variant)
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer, options=FLAT), strict=True)), checkpoint_id=folder)


def load_flat(variant: str, folder: str) -> dict:
    net, model = parallel_net("ddp")
    optimizer = optimizer_of(variant, net, decay=0.7)
    state = dict(zip("mo", get_state_dict(model, optimizer, options=FLAT), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["m"], optim_state_dict=state["o"], options=FLAT)
    return rest(net, model, optimizer)


@pytest.mark.parametrize("variant", ["gluon", "mvr3"])
def test_the_flattened_state(variant, tmp_path):
    started(2).run(save_flat, variant, str(tmp_path))
    assert_same(started(3).run(load_flat, variant, str(tmp_path)), expected(variant))


def without_waiting(variant: str, folder: str) -> dict:
    """The state is saved in the background while the training goes on."""
    net, model, optimizer = trained("ddp", variant)
    weights_state, state = get_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
    own = dist.new_group()  # its messages must not meet those of the training
    saving = dcp.async_save({"model": weights_state, "optim": state}, checkpoint_id=folder, process_group=own)
    rest(net, model, optimizer)
    saving.result()
    net, model = parallel_net("ddp")
    optimizer = optimizer_of(variant, net, decay=0.7)
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return rest(net, model, optimizer)


@pytest.mark.parametrize("variant", ["gluon", "mvr3"])
def test_a_checkpoint_in_the_background(variant, tmp_path):
    assert_same(started(2).run(without_waiting, variant, str(tmp_path)), expected(variant))


# One rank's share


def save_a_share(variant: str, folder: str) -> dict:
    net, model, optimizer = trained("ddp", variant)
    file = f"{folder}/{dist.get_rank()}.pt"
    state = optimizer.state_dict()
    for what in (state, state["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"].detach().clone()):
        with pytest.raises(RuntimeError, match="full_state_dict"):
            torch.save(what, file)
    with pytest.raises(RuntimeError, match="full_state_dict"):
        torch.stack([s["momentum_buffer"] for s in state["state"].values() if s["momentum_buffer"].shape == (8, 8)])
    torch.save(optimizer.full_state_dict(), file)
    fresh = optimizer_of(variant, net, decay=0.7)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return rest(net, model, fresh)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_is_not_saved(variant, tmp_path):
    assert_same(started(2).run(save_a_share, variant, str(tmp_path)), expected(variant))


def load_anothers_share() -> bool:
    """The second of two equal matrices belongs to rank 1; alone, it belongs to rank 0."""
    first, second = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    pair, single = Gluon([first, second]), Gluon([second])
    state = pair.state_dict()
    state["state"], state["param_groups"][0]["params"] = {0: state["state"][1]}, [0]
    try:
        single.load_state_dict(state)
    except ValueError as error:
        assert "full_state_dict" in str(error)
        return True
    return False


def test_another_ranks_share_is_refused():
    assert started(2).run(load_anothers_share) == [True, False]
