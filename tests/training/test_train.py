"""The trainer from outside: a run's files, which neither the number of ranks nor an interruption changes."""

import hashlib
import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import training.run_folder
from data.loader import BatchLoader, TokenStream
from model import GPT, GPTConfig
from tests.helpers.train_runs import Done, Trainer, data, trainer  # noqa: F401
from training.checkpoint import list_checkpoints
from training.run_folder import lock_of

pytestmark = pytest.mark.slow

VARIANTS = {
    "gluon": "--optimizer gluon --weight-decay 0.3",
    "mvr1": "--optimizer mvr1 --gamma 0.3 --warmup-steps 2",
    "mvr2": "--optimizer mvr2 --q 0.6",
    "mvr3": "--optimizer mvr3 --gamma 0.4 --weight-decay 0.3 --schedule theory",
    "previous_batch": "--optimizer previous_batch --gamma 0.4",
    "muon_mvr": "--optimizer muon_mvr --lr 1e-2",
    "muon_mvr_exact": "--optimizer muon_mvr --lr 1e-2 --compare-with previous_weights",
    "adamw": "--optimizer adamw",
    "torch_adamw": "--optimizer torch.optim:AdamW --lr 1e-2 --weight-decay 0",
}


@pytest.fixture(scope="module")
def uninterrupted(trainer):  # noqa: F811
    """Uninterrupted runs by variant, ranks and further options, each made once."""
    made: dict[tuple, Done] = {}

    def run(variant: str, ranks: int = 1, more: str = "") -> Done:
        key = (variant, ranks, more)
        if key not in made:
            name = f"{variant}-{ranks}-{len(made)}"
            made[key] = trainer.run(name, f"{VARIANTS[variant]} {more}", ranks=ranks).ok()
        return made[key]

    return run


def content(folder) -> dict[str, str]:
    """The checksums of all files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_close(a: Done, b: Done, tolerance: float) -> None:
    """The same lines, with losses that agree to the tolerance."""
    assert len(a.metrics) == len(b.metrics)
    for mine, theirs in zip(a.metrics, b.metrics, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value == theirs[key] or (key.endswith("loss") and abs(value - theirs[key]) < tolerance), (mine, theirs)


# ---- what a run writes


ONE_PASS = (lambda u: u, lambda u: u + 1)  # passes when update u is validated, and when the loss at the weights u is logged
DEFERRED = (lambda u: 2 * u + 1 if 0 < u < 7 else max(0, 2 * u - 1), lambda u: 2 * u + 1)
PASSES_AT = {
    **dict.fromkeys(("mvr1", "mvr2", "mvr3"), DEFERRED),
    "previous_batch": (lambda u: 2 * u, lambda u: 2 * u + 2),
    "muon_mvr_exact": (lambda u: max(0, 2 * u - 1), lambda u: 2 * u + 1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_follow_the_contract(uninterrupted, variant):
    done = uninterrupted(variant)
    at_validation, at_loss = PASSES_AT.get(variant, ONE_PASS)
    validations = [line for line in done.metrics if "val_loss" in line]
    losses = [line for line in done.metrics if "train_loss" in line]
    assert len(validations) + len(losses) == len(done.metrics)
    assert [line["update"] for line in validations] == [0, 3, 6, 7]
    assert [line["update"] for line in losses] == list(range(7))
    assert [line["passes"] for line in validations] == [at_validation(u) for u in (0, 3, 6, 7)]
    assert [line["passes"] for line in losses] == [at_loss(u) for u in range(7)]
    assert all(line["tokens"] == line["update"] * 8 * 16 for line in done.metrics)
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] - 0.1
    seconds = [json.loads(line)["seconds"] for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] == 0 < seconds[-1]


@pytest.mark.parametrize("variant", ["gluon", "mvr1", "mvr2", "mvr3", "previous_batch", "muon_mvr_exact"])
def test_update_is_the_index_of_the_weights(uninterrupted, trainer, variant):  # noqa: F811
    """The losses logged at update 3 are those of the final weights of a run of 3 updates, on batch 3 and in validation."""
    of_three = trainer.run(f"{variant}-three", f"{VARIANTS[variant]} --steps 3").ok()
    model = GPT(GPTConfig(61, 2, 2, 16, 16)).double()
    model.load_state_dict(load_file(of_three.folder / "model.safetensors"))
    batches = BatchLoader(TokenStream(trainer.data, "train"), batch_size=8, seq_len=16, shuffle_seed=0)
    losses = [line["train_loss"] for line in uninterrupted(variant).metrics if "train_loss" in line and line["update"] == 3]
    assert len(losses) == 1 and abs(model(*batches.batch(3)).item() - losses[0]) < 1e-12
    batches.close()
    validations = [line["val_loss"] for line in uninterrupted(variant).metrics if "val_loss" in line and line["update"] == 3]
    assert len(validations) == 1 and abs(of_three.metrics[-1]["val_loss"] - validations[0]) < 1e-12


def test_files(uninterrupted):
    done = uninterrupted("gluon")
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"checkpoints", "code.diff", "config.json", "environment.json", "metrics.jsonl", "model.safetensors"}
    config = json.loads((done.folder / "config.json").read_text())
    assert config["steps"] == 7 and config["weight_decay"] == 0.3 and config["dtype"] == "float64"
    (launch,) = json.loads((done.folder / "environment.json").read_text())
    assert launch["torch"] == torch.__version__ and launch["ranks"] == 1 and launch["step"] == 0
    assert any(name.startswith("numpy-") for name in launch["packages"])
    assert "8 sequences of 16 tokens a step = 1 ranks × 4 micro-batches × 2 sequences" in done.out
    assert done.err == ""


def test_the_revision_and_the_changes_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(training.run_folder, "_git", lambda root, *words: " ".join(words) + "\n")
    training.run_folder.prepare_run(tmp_path / "run", training.run_folder.Config(), None, None)
    (launch,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert launch["revision"] == "rev-parse HEAD"
    assert (tmp_path / "run" / "code.diff").read_text() == "diff HEAD\n"


def test_weights_load_into_the_model_and_give_the_last_loss(uninterrupted, trainer):  # noqa: F811
    done = uninterrupted("mvr2")
    model = GPT(GPTConfig(61, 2, 2, 16, 16)).double()
    model.load_state_dict(load_file(done.folder / "model.safetensors"))
    tokens = torch.from_numpy(TokenStream(trainer.data, "val").read(0, 513).astype("int64"))
    loss = model(tokens[:-1].view(32, 16), tokens[1:].view(32, 16)).item()
    assert abs(loss - done.metrics[-1]["val_loss"]) < 1e-12


# ---- world sizes


@pytest.mark.parametrize("variant, ranks", [("mvr1", 2), ("mvr3", 4)])
def test_ranks_see_the_same_tokens_and_losses(uninterrupted, variant, ranks):
    assert_close(uninterrupted(variant, ranks), uninterrupted(variant), 1e-9)


def test_ranks_agree_to_rounding_in_float32(uninterrupted):
    one, two = (uninterrupted("mvr2", ranks, "--dtype float32") for ranks in (1, 2))
    assert_close(one, two, 1e-4)
    assert one.metrics != uninterrupted("mvr2").metrics


@pytest.mark.parametrize("variant", ["mvr2", "muon_mvr_exact"])
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_four(uninterrupted, trainer, variant):  # noqa: F811
    saved = trainer.run(f"{variant}-two", f"{VARIANTS[variant]} --steps 4", ranks=2).ok()
    assert len(list((saved.folder / "checkpoints" / "step_0000004").glob("optimizer-*"))) == 2
    for ranks in (1, 4):
        options = f"{VARIANTS[variant]} --resume {saved.folder}"
        done = trainer.run(f"{variant}-from-two-{ranks}", options, ranks=ranks).ok()
        assert_close(done, uninterrupted(variant), 1e-9)


# ---- resuming


@pytest.mark.parametrize(
    "variant, ranks, steps",  # a longer run validates at 3, and not at 4
    [(variant, 1, 3) for variant in VARIANTS] + [("gluon", 1, 4), ("mvr3", 1, 4), ("mvr2", 2, 4), ("previous_batch", 2, 4)],
)
def test_a_finished_run_extends_exactly(uninterrupted, trainer, variant, ranks, steps):  # noqa: F811
    name = f"{variant}-extended-{ranks}-{steps}"
    trainer.run(name, f"{VARIANTS[variant]} --steps {steps} --resume auto", ranks=ranks).ok()
    extended = trainer.run(name, f"{VARIANTS[variant]} --resume auto", ranks=ranks).ok()
    assert f"steps {steps} to 7" in extended.out
    extended.same_as(uninterrupted(variant, ranks))
    launches = json.loads((extended.folder / "environment.json").read_text())
    assert [launch["step"] for launch in launches] == [0, steps]


def test_a_finished_run_started_again_stays_the_same(uninterrupted, trainer):  # noqa: F811
    done = uninterrupted("mvr2", 1, "--log-every 2")
    before = {name: digest for name, digest in content(done.folder).items() if name != "environment.json"}
    metrics = done.metrics
    again = trainer.run(done.folder.name, f"{VARIANTS['mvr2']} --log-every 2 --resume auto").ok()
    assert "all 7 steps are done" in again.out
    assert again.metrics == metrics
    after = content(done.folder)
    assert all(after[name] == digest for name, digest in before.items() if "metrics" not in name and "config" not in name)


def test_a_run_may_branch_from_another(uninterrupted, trainer):  # noqa: F811
    parent = trainer.run("parent", "--steps 4 --keep-checkpoints 9 --checkpoint-every 2").ok()
    before = content(parent.folder)
    child = trainer.run("child", f"--lr 5e-4 --resume {parent.folder}/checkpoints/step_0000002").ok()
    assert content(parent.folder) == before
    assert child.metrics[:3] == parent.metrics[:3] and child.metrics[-1] != parent.metrics[-1]
    assert [line["update"] for line in child.metrics if "train_loss" in line] == list(range(7))


def test_options_that_may_change_do_change(uninterrupted, trainer):  # noqa: F811
    """The optimizer's state in a checkpoint must not bring the old options back."""
    parent = trainer.run("options", "--steps 4").ok()
    runs = {}
    for number, options in enumerate(("", "--weight-decay 0.9", "--momentum 0.3", "--block-radius 3")):
        runs[options] = trainer.run(f"options-{number}", f"{options} --resume {parent.folder}").ok().metrics[-1]["val_loss"]
    assert len(set(runs.values())) == 4


def test_an_existing_run_is_never_overwritten(trainer):  # noqa: F811
    first = trainer.run("kept", "--steps 2").ok()
    before = content(first.folder)
    message = trainer.run("kept", "--steps 2 --seed 5").refusal()
    assert "exists; --resume auto continues it, --overwrite replaces it" in message
    assert "seed = 0, not 5" in trainer.run("kept", "--steps 2 --seed 5 --resume auto").refusal()
    assert content(first.folder) == before
    (first.folder / "notes.txt").write_text("mine")
    assert trainer.run("kept", "--steps 2 --seed 5 --overwrite").ok().metrics[0] != first.metrics
    assert (first.folder / "notes.txt").read_text() == "mine"


def test_a_run_is_written_by_one_process_at_a_time(trainer):  # noqa: F811
    trainer.results.mkdir(exist_ok=True)
    with lock_of(trainer.results / "shared"):
        for options in ("", "--resume auto", "--overwrite"):
            assert "is being written by another process" in trainer.run("shared", options).refusal()
        assert not (trainer.results / "shared").exists()
    trainer.run("shared", "--steps 2").ok()


def test_overwrite_leaves_a_foreign_folder_alone(trainer):  # noqa: F811
    folder = trainer.results / "home"
    folder.mkdir()
    (folder / "config.json").write_text('{"of": "another program"}')
    (folder / "thesis.tex").write_text("years of work")
    before = content(folder)
    for options in ("--overwrite", "--resume auto", "--resume auto --overwrite", ""):
        assert "is not a run of this trainer and was left alone" in trainer.run("home", options).refusal()
    assert content(folder) == before


def test_newest_checkpoints_and_milestones_are_kept(trainer):  # noqa: F811
    done = trainer.run("milestones", "--checkpoint-every 1 --keep-checkpoints 2 --keep-every 3").ok()
    names = [path.name for path in list_checkpoints(done.folder / "checkpoints")]
    assert names == ["step_0000007", "step_0000006", "step_0000003"]
    assert sorted(path.name for path in (done.folder / "checkpoints").iterdir()) == sorted(names)


# ---- signals


def slowly() -> None:
    """Slow the run down, so that a signal arrives in the middle."""
    batch = BatchLoader.batch

    def slow(self: BatchLoader, step: int):
        time.sleep(0.03)
        return batch(self, step)

    BatchLoader.batch = slow


LONG = "--optimizer mvr2 --steps 24 --val-every 10"


@pytest.fixture(scope="module")
def long_run(trainer):  # noqa: F811
    made = {}

    def run(ranks: int) -> Done:
        if ranks not in made:
            made[ranks] = trainer.run(f"long-{ranks}", LONG, ranks=ranks).ok()
        return made[ranks]

    return run


@pytest.mark.parametrize(
    "number, ranks, to", [("SIGTERM", 1, 0), ("SIGINT", 1, 0), ("SIGUSR1", 1, 0), ("SIGTERM", 2, 1), ("SIGUSR1", 2, 0)]
)
def test_a_signal_saves_and_ends_cleanly(trainer, long_run, number, ranks, to):  # noqa: F811
    name = f"{number}-{ranks}"
    running = trainer.start(name, LONG, ranks=ranks, patch=slowly)
    metrics = running.folder / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and metrics.read_text().count("train_loss") >= 4)
    at = metrics.read_text().count("train_loss")
    running.signal(signal.Signals[number], to)
    stopped = running.done().ok()
    assert "--resume auto continues from there" in stopped.out and stopped.err == ""
    (checkpoint,) = list_checkpoints(stopped.folder / "checkpoints")
    # The step in which the signal came, or the next one.
    assert at <= json.loads((checkpoint / "state.json").read_text())["step"] <= at + 2
    assert not (stopped.folder / "model.safetensors").exists()
    assert (stopped.folder / "requeue").exists() == (number != "SIGINT")
    resumed = trainer.run(name, f"{LONG} --resume auto", ranks=ranks).ok()
    resumed.same_as(long_run(ranks))
    assert not (stopped.folder / "requeue").exists()


# ---- the rest


def test_two_deterministic_runs_are_the_same(trainer):  # noqa: F811
    options = "--deterministic --optimizer mvr3 --momentum 0.2 --dtype float32"
    first = trainer.run("deterministic-1", options).ok()
    first.same_as(trainer.run("deterministic-2", options).ok())
    assert first.weights["embedding.weight"].dtype == "float32"


def test_a_loss_that_is_not_finite_ends_the_run(trainer: Trainer):  # noqa: F811
    """A learning rate that drives the weights out of float32 ends in one error line, and no checkpoint holds them."""
    done = trainer.run("thrown", "--lr 1e30 --dtype float32 --checkpoint-every 1")
    message = done.refusal()
    assert "finite" in message or "inf" in message or "nan" in message
    for path in list_checkpoints(done.folder / "checkpoints"):
        assert all(value.isfinite().all() for value in load_file(path / "model.safetensors").values())
