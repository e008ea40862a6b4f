"""The trainer with every optimizer: ours by name, torch's and a user's by class, MuonMVR in its three modes.

Most runs on several ranks share processes that stay alive (`ranks.Ranks`). Each run has its own model, DDP and optimizer.
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import optim
from data.loader import BatchLoader, TokenStream
from model import GPT, GPTConfig
from tests.helpers.ranks import Ranks as Processes
from tests.helpers.train_runs import ROOT, Done, data, trainer  # noqa: F401
from training.config import OPTIMIZERS, load_config
from training.last_gradient import LastGradient
from training.optimizers import build_optimizer, is_deferred, schedule

EVERY = {
    **{name: f"--optimizer {name}" for name in OPTIMIZERS},
    "mvr1": "--optimizer mvr1 --gamma 0.3",
    "mvr3": "--optimizer mvr3 --momentum 0.2",
    "previous_batch": "--optimizer previous_batch --gamma 0.4",
    "muon_mvr": "--optimizer muon_mvr --lr 1e-2",
    "muon_mvr, previous batch": "--optimizer muon_mvr --lr 1e-2 --compare-with previous_batch",
    "muon_mvr, previous weights": "--optimizer muon_mvr --lr 1e-2 --compare-with previous_weights",
    "torch's AdamW": "--optimizer torch.optim:AdamW --lr 1e-2 --weight-decay 0.1",
    "transported": "--optimizer experiments.contestants:Transported",
}
EXACT = ["gluon", "mvr2", "mvr3", "muon_mvr, previous batch", "muon_mvr, previous weights", "torch's AdamW", "transported"]


def train_here(lists: list[list[str]]) -> None:
    """Run the trainer once for each list of words. Called on each of several ranks."""
    from datetime import timedelta

    import torch.distributed as dist

    import train_gpt
    from training.ranks import Ranks

    host = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    for number, words in enumerate(lists):
        store = dist.PrefixStore(f"run{number}", dist.distributed_c10d._get_default_store())
        with contextlib.ExitStack() as at_end:
            train_gpt.run(load_config(words), Ranks(rank, size, torch.device("cpu"), host, host, store), at_end)


@pytest.fixture(scope="module")
def several(trainer):  # noqa: F811
    """A function that trains on several ranks, one run for each name and options. Returns what each run left."""
    processes: dict[int, Processes] = {}

    def run(ranks: int, **named: str) -> dict[str, Done]:
        if ranks not in processes:
            processes[ranks] = Processes(ranks, timeout=240)
        processes[ranks].run(train_here, [trainer.words(name, options) for name, options in named.items()])
        return {name: Done([0], "", "", trainer.results / name) for name in named}

    yield run
    for group in processes.values():
        group.stop()


def assert_close(a: Done, b: Done, tolerance: float = 1e-9) -> None:
    """The same lines, losses and weights, up to rounding."""
    assert len(a.metrics) == len(b.metrics)
    for mine, theirs in zip(a.metrics, b.metrics, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value == theirs[key] or (key.endswith("loss") and abs(value - theirs[key]) < tolerance), (mine, theirs)
    for name, value in a.weights.items():
        assert abs(value - b.weights[name]).max() <= tolerance * abs(value).max(), name


# ---- all optimizers, one and two ranks


@pytest.fixture(scope="module")
def curves(several, trainer):  # noqa: F811
    """Each optimizer on one rank and on two."""
    one = [trainer.run(f"one-{i}", options).ok() for i, options in enumerate(EVERY.values())]
    two = several(2, **{f"two-{i}": options for i, options in enumerate(EVERY.values())})
    return dict(zip(EVERY, zip(one, two.values(), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_two_ranks_train_as_one_does(curves, kind):
    one, two = curves[kind]
    assert_close(two, one)
    losses = [line["val_loss"] for line in one.metrics if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_no_two_optimizers_are_the_same(curves):
    assert len({one.metrics[-1]["val_loss"] for one, _ in curves.values()}) == len(curves)


# ---- resuming, on three ranks and on four


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_resume_is_exact_on_several_ranks(several, ranks):
    """From a checkpoint in the middle of a run, the final weights are the same byte for byte."""
    runs = {f"exact{ranks}-{i}": EVERY[kind] for i, kind in enumerate(EXACT)}
    options = "--batch-size 12 --steps 5 --checkpoint-every 3 --keep-checkpoints 9"
    whole = several(ranks, **{name: f"{o} {options}" for name, o in runs.items()})
    resumed = several(
        ranks,
        **{f"{n}-on": f"{o} {options} --resume {whole[n].folder}/checkpoints/step_0000003" for n, o in runs.items()},
    )
    for kind, name in zip(EXACT, runs, strict=True):
        mine, right = resumed[f"{name}-on"], whole[name]
        assert mine.metrics == right.metrics, kind
        assert (mine.folder / "model.safetensors").read_bytes() == (right.folder / "model.safetensors").read_bytes(), kind
        (launch,) = json.loads((mine.folder / "environment.json").read_text())
        assert launch["step"] == 3
    if ranks == 3:  # and with another number of ranks, up to rounding
        fewer = several(
            2, **{f"{n}-two": f"{o} {options} --resume {whole[n].folder}/checkpoints/step_0000003" for n, o in runs.items()}
        )
        for name in runs:
            assert_close(fewer[f"{name}-two"], whole[name])


# ---- MuonMVR's three modes


def readme_loop(mode: str, model: GPT, optimizer: optim.MuonMVR, batches: list) -> None:
    """The loops of MUON-MVR's README."""
    previous_batch, old_weights = None, None
    for x, y in batches:
        present = {name: value.clone() for name, value in model.state_dict().items()}
        if mode == "previous_batch" and previous_batch is not None:
            model(*previous_batch).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad()
        if mode == "previous_weights" and old_weights is not None:
            model.load_state_dict(old_weights)
            model(x, y).backward()
            optimizer.update_last_grad()
            optimizer.zero_grad()
            model.load_state_dict(present)
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        previous_batch, old_weights = (x, y), present


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["last_step", "previous_batch", "previous_weights"])
def test_muon_mvr_is_the_loop_of_its_readme(trainer, mode):  # noqa: F811
    """One process and no accumulation: to the bit, over 7 steps."""
    options = f"--optimizer muon_mvr --lr 1e-2 --gamma 0.3 --momentum 0.9 --micro-batch-size 8 --compare-with {mode}"
    done = trainer.run(f"readme-{mode}", options).ok()
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 2, 2, 16, 16)).double()
    groups = [
        {"params": list(model.blocks.parameters()), "use_muon": True},
        {"params": [model.embedding.weight], "use_muon": False},
    ]
    optimizer = optim.MuonMVR(groups, lr=1e-2, gamma=0.3, momentum=0.9, is_approx=mode == "last_step")
    loader = BatchLoader(TokenStream(trainer.data, "train"), batch_size=8, seq_len=16, shuffle_seed=0)
    readme_loop(mode, model, optimizer, [loader.batch(step) for step in range(7)])
    loader.close()
    for name, value in model.state_dict().items():
        assert (done.weights[name] == value.numpy()).all(), name


def test_a_last_gradient_recovers_after_a_bad_batch():
    """The step after a bad batch compares with it and fails too; the next step does not."""
    taken = []

    def gradients(batch: str) -> None:
        taken.append(batch)
        if batch == "bad":
            raise ArithmeticError

    weight = torch.nn.Parameter(torch.ones(2, 2))
    before_step = LastGradient(optim.MuonMVR([weight]), "previous_batch", None, gradients).before_step
    before_step(0, "first")
    before_step(1, "bad")
    with pytest.raises(ArithmeticError):
        before_step(2, "third")
    before_step(3, "fourth")
    assert taken == ["first", "bad", "third"]


# ---- optimizers by class

RENAMED = """
from optim import GluonMVR3, PreviousBatchMVR

class Mine(GluonMVR3):
    pass

class Gluon(PreviousBatchMVR):
    "Neither its name nor its file says how many passes it takes."
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, like", [("Mine", "mvr3"), ("Gluon", "previous_batch")])
def test_a_subclass_next_to_a_config_trains_like_its_base(trainer, tmp_path, name, like):  # noqa: F811
    (tmp_path / "my_rules.py").write_text(RENAMED)
    config = tmp_path / "mine.py"
    config.write_text(f"optimizer = 'my_rules:{name}'\nmomentum = 0.2\n")
    right = trainer.run(f"named-{name}", f"--optimizer {like} --momentum 0.2").ok()
    trainer.run(f"class-{name}", f"--config {config}").ok().same_as(right)
    two = trainer.run(f"class-{name}-two", f"--config {config}", ranks=2).ok()
    assert_close(two, right)
    resumed = trainer.run(f"class-{name}-on", f"--config {config} --steps 4", ranks=2).ok()
    trainer.run(resumed.folder.name, f"--config {config} --resume auto", ranks=2).ok().same_as(two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options", [("AdamW", {"betas": [0.8, 0.9], "weight_decay": 0.1}), ("Muon", {"nesterov": False})]
)
def test_an_optimizer_of_torch_trains_as_in_torch(trainer, tmp_path, name, options):  # noqa: F811
    """A plain loop with the config's options gives the trainer's weights bit for bit."""
    embed = {"lr": 0.0} if name == "Muon" else {"betas": [0.7, 0.9]}
    config = tmp_path / "of_torch.py"
    config.write_text(f"optimizer_options = {options}\nembed_options = {embed}\n")
    words = f"--optimizer torch.optim:{name} --lr 0.01 --micro-batch-size 8 --config {config}"
    done = trainer.run(f"torch-{name}", words).ok()
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, 2, 2, 16, 16)).double()
    groups = [{"params": list(model.blocks.parameters())}, {"params": [model.embedding.weight], **embed}]
    optimizer = getattr(torch.optim, name)(groups, lr=0.01, **options)
    loader = BatchLoader(TokenStream(trainer.data, "train"), batch_size=8, seq_len=16, shuffle_seed=0)
    for step in range(7):
        optimizer.zero_grad()
        model(*loader.batch(step)).backward()
        optimizer.step()
    loader.close()
    for key, value in model.state_dict().items():
        assert (done.weights[key] == value.numpy()).all(), key


def test_the_names_are_those_of_the_optimizers():
    assert set(OPTIMIZERS) == {*optim.BY_NAME, "adamw"}


def test_passes_come_from_the_class():
    model = GPT(GPTConfig(61, 1, 2, 16, 16))
    facts = {}
    for name in (*OPTIMIZERS, "torch.optim:SGD"):
        optimizer = build_optimizer(model, load_config(["--optimizer", name, "--lr", "1e-3"]))
        facts[name] = is_deferred(optimizer), getattr(optimizer, "passes", 1)
    assert facts == dict.fromkeys(("gluon", "single_batch", "muon_mvr", "adamw", "torch.optim:SGD"), (False, 1)) | {
        **dict.fromkeys(("mvr1", "mvr2", "mvr3"), (True, 2)), "previous_batch": (False, 2)
    }  # fmt: skip


def test_options_reach_the_groups():
    model = GPT(GPTConfig(61, 1, 2, 16, 16))
    words = "--optimizer mvr3 --q 0.4 --gamma 0.3 --momentum 0.7 --weight-decay 0.1 --no-bias-correction --scale muon"
    blocks, embedding = build_optimizer(
        model, load_config([*words.split(), "--embed-options", '{"norm":"adamw","betas":[0.8,0.9],"lr":0.5}'])
    ).param_groups
    for group in (blocks, embedding):
        values = [group[key] for key in ("q", "gamma", "momentum", "weight_decay", "bias_correction", "scale")]
        assert values == [0.4, 0.3, 0.7, 0.1, False, "muon"]
    assert (blocks["norm"], blocks["radius"], blocks["lr"]) == ("spectral", 50, 3.6e-4)
    assert (embedding["norm"], list(embedding["betas"]), embedding["lr"]) == ("adamw", [0.8, 0.9], 0.5)


# ---- schedules


def test_schedules():
    model = GPT(GPTConfig(61, 1, 2, 16, 16))

    def course(options: str, steps=range(10)) -> list[tuple[float, float]]:
        config = load_config(f"--lr 2 --steps 10 {options}".split())
        optimizer = build_optimizer(model, config)
        set_step = schedule(optimizer, config)
        groups = []
        for step in steps:
            set_step(step)
            groups.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum")))
        return groups

    assert course("") == [(2, 0.9)] * 10
    assert course("--warmup-steps 3")[:4] == [(0.5, 0.9), (1, 0.9), (1.5, 0.9), (2, 0.9)]
    linear = [lr for lr, _ in course("--schedule linear --warmdown-steps 4")]
    assert linear == [2] * 7 + [1.5, 1, 0.5]
    assert [lr for lr, _ in course("--schedule linear --warmdown-steps 4 --optimizer torch.optim:AdamW")] == linear
    for name, lr, weight in (("gluon", -3 / 4, -1 / 2), ("mvr1", -2 / 3, -2 / 3), ("previous_batch", -2 / 3, -2 / 3)):
        for k, (at, momentum) in enumerate(course(f"--schedule theory --optimizer {name}")):
            assert abs(at - 2 * (k + 1) ** lr) < 1e-12 and abs(momentum - (1 - (k + 1) ** weight)) < 1e-12


# ---- the configs

OURS = {
    "gluon": optim.Gluon, "mvr1": optim.GluonMVR1, "mvr2": optim.GluonMVR2, "mvr3": optim.GluonMVR3, "adamw": optim.Gluon,
    "single_batch": optim.SingleBatchMVR, "previous_batch": optim.PreviousBatchMVR, "muon_mvr": optim.MuonMVR,
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_builds_its_optimizer_and_trains(path: Path):
    config = load_config(["--config", str(path), "--vocab-size", "257", "--n-layer", "1", "--n-head", "2", "--d-model", "16"])
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 1, 2, 16, 16))
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is OURS[config.optimizer]
    given = {key: value for key in ("momentum", "gamma", "q") if (value := getattr(config, key)) is not None}
    assert given.items() <= optimizer.param_groups[0].items()
    set_schedule = schedule(optimizer, config)
    tokens = torch.randint(257, (4, 17))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss

    losses = []
    for step in range(4):
        set_schedule(step)
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < losses[0]
