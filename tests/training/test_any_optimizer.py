"""Any optimizer trains, is validated at its own weights and resumes bit for bit, or is refused before the first step."""

import functools
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from model import GPT, GPTConfig
from tests.helpers.train_runs import data, trainer  # noqa: F401
from tests.training.test_bad_input import Malice, resealed
from tests.training.test_not_finite import poison
from training.checkpoint import list_checkpoints
from training.config import load_config
from training.driver import random_state, set_random_state
from training.optimizers import build_optimizer, schedule
from training.packing import from_bytes, to_bytes
from training.ranks import Ranks
from training.rehearsal import drive

MODULE = "tests.helpers.any_optimizers"
EXACT = {
    "Plain": 1, "NoClosure": 1, "IgnoresClosure": 1, "Sam": 2, "TwoGradients": 2, "Averaged": 1, "Exotic": 1, "LowBit": 1,
    "HasObjects": 1, "ChangesGroup": 1, "Hooked": 1, "Draws": 1, "StartsInfinite": 1, "MovesFirst": 1, "OneGroup": 1,
    "NoLr": 1, "NeedsGradient": 2, "Counts": 1, "EditsWhatItLoads": 1, "examples.sam:SAM": 2,
}  # class: passes a step  # fmt: skip


def words(name: str, **options: object) -> str:
    """The options of a run of 6 steps, with a checkpoint in the middle."""
    all_options = {"lr": 0.05, "steps": 6, "val_every": 2, "checkpoint_every": 3, "keep_checkpoints": 9} | options
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in all_options.items())
    return f"--optimizer {name if ':' in name else f'{MODULE}:{name}'} {given}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_it_trains_and_resumes_bit_for_bit(trainer, name, dtype):  # noqa: F811
    options = words(name, dtype=dtype)
    whole = trainer.run(f"{name.rpartition(':')[2]}-{dtype}", options).ok()
    resumed = trainer.run(f"{whole.folder.name}-on", f"{options} --resume {whole.folder}/checkpoints/step_0000003").ok()
    resumed.same_as(whole)
    losses = [line["val_loss"] for line in whole.metrics if "val_loss" in line]
    assert losses[-1] < losses[0]
    assert [line["update"] for line in whole.metrics if "train_loss" in line] == list(range(6))
    assert whole.metrics[-1]["passes"] == 6 * EXACT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IgnoresClosure", "Sam", "Averaged", "Exotic", "PerRank"])
def test_two_ranks_train_as_one_does(trainer, name):  # noqa: F811
    one = trainer.run(f"{name}-one", words(name)).ok()
    two = trainer.run(f"{name}-two", words(name), ranks=2).ok()
    start = f"--resume {two.folder}/checkpoints/step_0000003"
    trainer.run(f"{name}-two-on", f"{words(name)} {start}", ranks=2).ok().same_as(two)
    for key, value in one.weights.items():
        assert abs(value - two.weights[key]).max() <= 1e-6 * abs(value).max(), key
    if name == "PerRank":
        assert "by 2 ranks" in trainer.run(f"{name}-fewer", f"{words(name)} {start}").refusal()


@pytest.mark.slow
def test_a_class_with_two_modes_is_validated_and_published_in_one(trainer):  # noqa: F811
    """After the first step, the average is where the class is: the same loss as without the average."""
    done = trainer.run("modes", words("Averaged", val_every=1)).ok()
    plain = trainer.run("no-modes", words("Plain", val_every=1)).ok()
    mine, theirs = ({line["update"]: line["val_loss"] for line in run.metrics if "val_loss" in line} for run in (done, plain))
    assert mine[0] == theirs[0] and abs(mine[1] - theirs[1]) < 1e-12
    assert all(mine[update] != theirs[update] for update in range(2, 7))
    # What is published is the mean of the six places.
    places = [trainer.run(f"place-{k}", words("Plain", steps=k)).ok().weights for k in range(1, 7)]
    for key, value in done.weights.items():
        np.testing.assert_allclose(value, np.mean([place[key] for place in places], axis=0), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_the_gradient_of_sam_is_that_of_a_plain_loop(trainer):  # noqa: F811
    """Its first pass is at the weights, its second one up the hill."""
    sam = trainer.run("sam", words("Sam")).ok()
    plain = trainer.run("plain", words("Plain")).ok()
    first = next(line["train_loss"] for line in sam.metrics if "train_loss" in line)
    assert first == next(line["train_loss"] for line in plain.metrics if "train_loss" in line)
    assert any((sam.weights[key] != value).any() for key, value in plain.weights.items())


@pytest.mark.slow
def test_a_class_that_gathers_gradients_first_is_given_time(trainer):  # noqa: F811
    assert trainer.run("patient", words("Patient", steps=3)).ok().weights


@pytest.mark.slow
def test_a_step_that_takes_no_gradient_ends_the_run(trainer):  # noqa: F811
    done = trainer.run("stops-asking", words("StopsAsking", steps=14, checkpoint_every=11))
    assert "StopsAsking: its step took no gradient of the batch" in done.refusal() and done.metrics[-1]["update"] >= 10


REFUSED = {
    "SecondDerivatives": "it needs second derivatives (create_graph=True)",
    "Frozen": "changed no weight",
    "Hidden": "a run could not resume, because part of its state is not in its state_dict(); --checkpoint-every 0",
    "HoldsCode": "its state can't be saved (TypeError: state.0.lock is a _thread.lock); --checkpoint-every 0",
    "HalfFrozen": """it needs use_muon in each group; give it with --param-groups '[["*", {"use_muon": ...}]]'""",
    "OfModel": """its constructor needs total_steps; give it with --optimizer-options '{"total_steps": ...}'""",
    "Wraps": "its constructor needs base_optimizer; write a class that makes both, as examples/sam.py does",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_work_is_refused_before_the_first_step(trainer, name):  # noqa: F811
    done = trainer.run(f"refused-{name}", words(name))
    assert done.refusal().startswith(f"train_gpt: optimizer = {MODULE}:{name}: ") and REFUSED[name] in done.refusal()
    assert not done.folder.exists()


@pytest.mark.slow
def test_ranks_that_would_part_are_refused(trainer):  # noqa: F811
    assert "other weights on each rank" in trainer.run("part", words("RanksDiffer"), ranks=2).refusal()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_checkpoints_anything_trains_to_its_weights(trainer, ranks):  # noqa: F811
    for name in ("Hidden", "HoldsCode"):
        done = trainer.run(f"{name}-{ranks}", words(name, checkpoint_every=0), ranks=ranks).ok()
        assert done.weights and not list_checkpoints(done.folder / "checkpoints")
        assert "writes no checkpoints, because" in done.out


@pytest.mark.slow
def test_a_run_keeps_its_weights_if_its_state_can_not_be_written(trainer):  # noqa: F811
    done = trainer.run("late", words("HoldsCodeLate", steps=12, checkpoint_every=6))
    assert "the last checkpoint could not be written (the optimizer's state can't be saved: TypeError" in done.refusal()
    assert done.metrics[-1]["update"] == 12 and done.weights
    assert [path.name for path in list_checkpoints(done.folder / "checkpoints")] == ["step_0000006"]


@pytest.mark.slow
@pytest.mark.parametrize("name, last_pass", [("MovesFirst", 1), ("Sam", 2), ("TwoGradients", 2)])
def test_a_skipped_step_leaves_weights_and_state(trainer, name, last_pass):  # noqa: F811
    """The last of 5 steps is skipped: the weights and the state are those of 4."""
    patch = functools.partial(poison, 4, "loss", passes=(last_pass,))
    skipping = trainer.run(f"{name}-skips", words(name, on_nan="skip", steps=5), patch=patch).ok()
    four = trainer.run(f"{name}-four", words(name, steps=4)).ok()
    assert all((value == four.weights[key]).all() for key, value in skipping.weights.items())
    newest = [list_checkpoints(run.folder / "checkpoints")[0] / "optimizer-00000.pt" for run in (skipping, four)]
    mine, theirs = (to_bytes(from_bytes(path.read_bytes())["optimizer"]) for path in newest)
    assert mine == theirs


@pytest.mark.slow
def test_skipping_is_refused_for_what_can_not_go_back(trainer):  # noqa: F811
    done = trainer.run("no-way-back", words("HiddenMovesFirst", checkpoint_every=0, on_nan="skip"))
    assert "--on-nan skip can't take a step back, because part of its state" in done.refusal()


def test_a_checkpoint_executes_nothing(trainer, tmp_path):  # noqa: F811
    whole = trainer.run("harmless", words("Exotic")).ok()
    checkpoint = whole.folder / "checkpoints" / "step_0000003"
    resealed("optimizer-00000.pt", pickle.dumps(Malice()))(checkpoint)
    done = trainer.run("harmful", words("Exotic") + f" --resume {checkpoint}")
    assert "belongs to another optimizer" in done.refusal() and not Path("executed").exists()
    resealed("optimizer-00000.pt", to_bytes({"optimizer": Malice()}))(checkpoint)
    done = trainer.run("harmful-too", words("Exotic") + f" --resume {checkpoint}")
    assert "belongs to another optimizer" in done.refusal() and not Path("executed").exists()


def test_a_trial_leaves_the_generators_where_they_were():
    def draw():
        return torch.rand(()).item(), random.random(), np.random.random()

    config = load_config(f"--optimizer {MODULE}:Draws --vocab-size 61 --n-layer 1 --n-head 2 --d-model 16".split())
    model = GPT(GPTConfig(61, 1, 2, 16, config.seq_len))
    optimizer, ranks = build_optimizer(model, config), Ranks(0, 1, torch.device("cpu"))
    before = random_state(ranks.device)
    expected = draw()
    set_random_state(before, ranks.device)
    drive(optimizer, model, config, ranks)
    assert draw() == expected


# ---- groups and options


def built(options: str, *more: str) -> torch.optim.Optimizer:
    return build_optimizer(GPT(GPTConfig(61, 2, 2, 16, 16)), load_config([*options.split(), *more]))


def test_param_groups_are_taken_in_order_and_once():
    groups = '[["blocks.0.*", {"radius": 3}], ["blocks.*", {"norm": "sign"}], ["*", {"lr": 0.5}]]'
    first, second, last = built("--optimizer mvr2", "--param-groups", groups).param_groups
    assert [len(group["params"]) for group in (first, second, last)] == [6, 6, 1]
    assert [(g["norm"], g["radius"], g["lr"]) for g in (first, second, last)] == [
        ("spectral", 3, 3.6e-4), ("sign", 50, 3.6e-4), ("sign", 3000, 0.5)
    ]  # fmt: skip
    muon = built(
        f"--optimizer {MODULE}:HalfFrozen", "--param-groups", '[["blocks.*",{"use_muon":true}],["*",{"use_muon":false}]]'
    )
    assert [group["use_muon"] for group in muon.param_groups] == [True, False]


@pytest.mark.parametrize(
    "groups, says",
    [
        ('[["blocks.*", {}]]', 'no pattern matches embedding.weight; end with ["*", {}]'),
        ('[["block.*", {}], ["*", {}]]', "nothing is left for the pattern 'block.*'; the names are"),
        ('[["*", {}], ["blocks.*", {}]]', "nothing is left for the pattern 'blocks.*'; an earlier pattern"),
        ('[["*", {"radios": 3}]]', "radios is not an option of optimizer = gluon"),
        ("[]", "param-groups must be pairs of a pattern and options"),
        ('{"blocks.*": {}}', "param-groups must be pairs of a pattern and options"),
        ('[["*", {"params": 3}]]', "param-groups must be pairs of a pattern and options"),
    ],
)
def test_wrong_param_groups_are_refused(groups, says):
    with pytest.raises(UserError, match=re.escape(says)):
        built("", "--param-groups", groups)


def test_a_constructor_gets_what_only_the_trainer_has():
    assert len(built(f"--optimizer {MODULE}:OfModel", "--optimizer-options", '{"total_steps": 9}').param_groups) == 1


def test_a_constant_schedule_leaves_the_lr_alone():
    for optimizer, options in (("ChangesGroup", ""), ("NoLr", "")):
        made = built(f"--optimizer {MODULE}:{optimizer}")
        made.param_groups[0]["lr"] = 7.0
        schedule(made, load_config(options.split()))(3)
        assert made.param_groups[0]["lr"] == 7.0
    with pytest.raises(UserError, match="its groups have no lr"):
        schedule(built(f"--optimizer {MODULE}:NoLr"), load_config(["--warmup-steps", "3"]))


@pytest.mark.slow
def test_a_resume_without_a_schedule_forgets_the_lr_of_the_schedule(trainer):  # noqa: F811
    options = {"schedule": "linear", "warmdown_steps": 6}
    start = f"--resume {trainer.run('falls', words('Plain', **options)).ok().folder}/checkpoints/step_0000003"
    constant = trainer.run("constant", f"{words('Plain', schedule='constant')} {start}").ok()
    flat = trainer.run("flat", f"{words('Plain', **options | {'warmdown_steps': 0})} {start}").ok()
    assert all((value == flat.weights[key]).all() for key, value in constant.weights.items())


@pytest.mark.slow
def test_a_resume_keeps_what_the_class_changed_and_takes_what_the_user_did(trainer):  # noqa: F811
    whole = trainer.run("changes", words("ChangesGroup")).ok()
    start = f"--resume {whole.folder}/checkpoints/step_0000003"
    other = trainer.run("changes-d", words("ChangesGroup", lr=0.01) + f" {start}").ok()
    places = [trainer.run(f"changes-{k}", words("ChangesGroup", steps=k)).ok().weights for k in (3, 4)]
    one = trainer.run("changes-one", words("ChangesGroup", lr=0.01, steps=4) + f" {start}").ok()
    for key, three in places[0].items():  # the step is 0.01 * d with the d of step 3; it was 0.05 * 0.8**3 * d
        np.testing.assert_allclose(
            (one.weights[key] - three) * 0.05 * 0.8**3 / 0.01, places[1][key] - three, rtol=1e-6, atol=1e-12
        )
    assert any((value != whole.weights[key]).any() for key, value in other.weights.items())
