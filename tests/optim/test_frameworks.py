"""The examples' frameworks with what their users switch on: clipping, accumulation, mixed precision, schedules, resuming."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import forked
from tests.helpers.train_runs import free_port
from tests.optim.test_examples import assert_differ, framework, task

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HALF, CLIP = task.STEPS // 2, 0.2


def single(net: type[torch.nn.Module] = task.Net) -> torch.nn.Module:
    """Autocast leaves float64 alone."""
    return net().float()


def single_batch(step: int) -> list[torch.Tensor]:
    return [t.float() for t in task.batch(step)]


@functools.cache
def by_hand(
    variant: str, bf16: bool = False, clip: float = 0.0, schedule: bool = False, epochs: int = 1, micro: int = task.MICRO
) -> list[torch.Tensor]:
    """The final weights of a plain loop. `schedule`: linear, to 0. `micro`: rows of a micro-batch."""
    net, make = (single(), single_batch) if bf16 else (task.Net(), task.batch)
    optimizer = task.build(variant, net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / (epochs * task.STEPS) if schedule else 1)
    for step in range(epochs * task.STEPS):
        x, y = make(step % task.STEPS)

        def closure(x=x, y=y):
            total = torch.zeros(())
            for xs, ys in zip(x.split(micro), y.split(micro), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = net(xs, ys) * micro / task.ROWS
                loss.backward()
                total += loss.detach()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            return total

        optimizer.step(closure)
        scheduler.step()
    optimizer.flush()
    return [p.detach() for p in net.parameters()]


def assert_weights(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=tolerance, atol=tolerance)


def assert_same_weights(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_switch_changes_the_weights():
    """So a framework that ignores one of them fails below."""
    plain = (None, by_hand("single_batch"))
    for options in ({"clip": CLIP}, {"schedule": True}, {"bf16": True}):
        assert_differ((None, [w.double() for w in by_hand("single_batch", **options)]), plain)


@pytest.mark.parametrize("variant", task.ONE_PASS)
def test_trainer(variant, tmp_path, monkeypatch):
    script = framework("transformers", "huggingface_trainer")
    monkeypatch.setattr(script, "Net", single)
    monkeypatch.setattr(script, "batch", single_batch)
    options = {"bf16": True, "max_grad_norm": CLIP, "lr_scheduler_type": "linear"}
    saving = {"save_strategy": "steps", "save_steps": HALF}
    _, weights = script.train(variant, str(tmp_path), **options, **saving)
    assert_weights(weights, by_hand(variant, True, CLIP, True), 1e-5)
    _, resumed = script.train(variant, str(tmp_path), resume=str(tmp_path / f"checkpoint-{HALF}"), **options)
    assert_same_weights(resumed, weights)


@pytest.mark.parametrize("variant", ["gluon", "mvr3", "previous_batch"])
def test_accelerate(variant, tmp_path, monkeypatch):
    script = framework("accelerate", "accelerate_loop")
    monkeypatch.setattr(script, "Net", single)
    monkeypatch.setattr(script, "batch", single_batch)
    accelerator, file = script.Accelerator(cpu=True), str(tmp_path / "half.pt")
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "bf16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    _, weights = script.train(variant, accelerator, save_to=file)
    assert_weights(weights, by_hand(variant, True), 1e-5)
    _, resumed = script.train(variant, accelerator, resume=file)
    assert_same_weights(resumed, weights)


@pytest.mark.parametrize("variant", ["gluon", "mvr2"])
def test_accelerates_own_checkpoint_schedule_and_clipping(variant, tmp_path):
    """`prepare` for all, `save_state` and `load_state`. The closure clips, which is for variants with one pass."""
    script = framework("accelerate", "accelerate_loop")
    accelerator, clip = script.Accelerator(cpu=True), CLIP if variant in task.ONE_PASS else 0.0

    def run(first: int, net: torch.nn.Module) -> list[torch.Tensor]:
        optimizer = task.build(variant, net)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / task.STEPS)
        model, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
        if first:
            accelerator.load_state(str(tmp_path / "half"))
        for step in range(first, task.STEPS):

            def closure(step=step):
                accelerator.backward(loss := model(*task.batch(step)))
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                return loss.detach()

            optimizer.step(closure)
            scheduler.step()
            if step + 1 == HALF and not first:
                accelerator.save_state(str(tmp_path / "half"))
        optimizer.optimizer.flush()
        accelerator.free_memory()
        return [p.detach() for p in net.parameters()]

    weights = run(0, task.Net())
    assert_weights(weights, by_hand(variant, clip=clip, schedule=True))
    assert_same_weights(run(HALF, task.Net()), weights)


@pytest.mark.parametrize("variant", ["gluon", "mvr2"])
def test_a_scaler_with_a_closure_is_refused(variant):
    script = framework("accelerate", "accelerate_loop")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator, net, scaler = script.Accelerator(cpu=True), task.Net(), torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(task.build(variant, net), scaler=scaler)
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        scaler.scale(loss := net(*task.batch(0))).backward()
        return loss

    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(task.build(variant, net), closure=closure)
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):  # accelerate gives the closure by position
        optimizer.step(closure)
    accelerator.scaler = scaler
    with pytest.raises(ValueError, match="use bf16"):
        script.train(variant, accelerator)
    assert_same_weights([p.detach() for p in net.parameters()], before)


def with_schedule(kind, epochs=2):
    """A module of the Lightning example with a schedule that the framework (or, in manual optimization, the module) steps."""

    class Scheduled(kind):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / (epochs * task.STEPS))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, micro_batch, index):
            loss = super().training_step(micro_batch, index)
            if not self.automatic_optimization and not self.waiting:
                self.lr_schedulers().step()
            return loss

    return Scheduled


@pytest.mark.parametrize(("kind", "variant"), [("Manual", "mvr3"), ("Automatic", "gluon"), ("Automatic", "mvr1")])
def test_lightning(kind, variant, tmp_path, monkeypatch):
    script = framework("lightning", "lightning_module")
    from lightning.pytorch.callbacks import ModelCheckpoint

    monkeypatch.setattr(script, "Net", single)
    monkeypatch.setattr(script, "batch", single_batch)
    clip = CLIP if variant in task.ONE_PASS else 0.0
    options = {"max_epochs": 2, "precision": "bf16-mixed"} | ({"gradient_clip_val": clip} if clip else {})
    rows = task.MICRO if kind == "Manual" else task.ROWS
    saving = ModelCheckpoint(str(tmp_path), "{epoch}", save_top_k=-1)
    module = with_schedule(getattr(script, kind))(variant)
    script.fit(module, rows, enable_checkpointing=True, callbacks=[saving], **options)
    assert_weights(module.net.parameters(), by_hand(variant, True, clip, True, 2, rows), 1e-5)
    resumed = with_schedule(getattr(script, kind))(variant)
    script.fit(resumed, rows, resume=str(tmp_path / "epoch=0.ckpt"), **options)
    assert len(resumed.losses) < len(module.losses)
    assert_same_weights(resumed.net.parameters(), module.net.parameters())
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]


def test_lightning_refuses_what_it_cannot_do():
    script = framework("lightning", "lightning_module")
    with pytest.raises(ValueError, match="gradient_clip_val must be off"):
        script.fit(script.Automatic("mvr2"), gradient_clip_val=CLIP)
    with pytest.raises(Exception, match="manual optimization"):
        script.fit(script.Manual("gluon"), gradient_clip_val=CLIP)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What tests/helpers/framework_ranks.py found."""
    for package in ("transformers", "accelerate", "lightning"):
        pytest.importorskip(package, reason=f"{package} is a test dependency (requirements-dev.txt) and is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-m", "tests.helpers.framework_ranks", str(folder)]
    ranks = [
        forked.Popen(command, ROOT, {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(errors)[-5000:]
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(
    ("name", "variant", "options"),
    [
        ("trainer", "single_batch", {"clip": CLIP, "schedule": True}),
        ("accelerate", "mvr3", {}),
        ("fsdp2", "gluon", {}),
        ("fsdp2", "mvr3", {}),
        ("fsdp2", "previous_batch", {}),
        ("manual", "mvr2", {"schedule": True, "epochs": 2}),
        ("automatic", "gluon", {"clip": CLIP, "schedule": True, "epochs": 2}),
    ],
)
def test_on_two_ranks(on_two_ranks, name, variant, options):
    """The weights of one process, also from a checkpoint of two ranks."""
    found = on_two_ranks[f"{name} {variant}"]
    assert_weights(found["weights"], by_hand(variant, **options), 1e-9)
    if "resumed" in found:
        assert_same_weights(found["resumed"], found["weights"])


def test_accelerates_save_state_refuses_a_share(on_two_ranks):
    assert "full_state_dict" in on_two_ranks["save_state"]
