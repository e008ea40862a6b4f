"""Every example runs, and trains exactly as the plain loop does; what a framework cannot do is refused in clear words."""

import contextlib
import importlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from reference import trajectory
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import plain_pytorch
import task

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("gluon", "mvr1", "mvr2", "mvr3")
FLOAT32 = 1e-6  # what the Trainer logs its losses in; the weights are float64


@pytest.fixture(scope="module")
def plain():
    return {variant: plain_pytorch.train(variant) for variant in VARIANTS}


def framework(package: str, script: str):
    """The module of a script; skips where its framework is not installed."""
    pytest.importorskip(package, reason=f"{package} is a test dependency (requirements-dev.txt) and is not installed")
    return importlib.import_module(script)


def assert_same(run, expected, losses=1e-12):
    assert len(run[0]) == len(expected[0]) == task.STEPS
    assert run[0] == pytest.approx(expected[0], rel=losses)
    for ours, theirs in zip(run[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def assert_differ(run, expected):
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(run[1], expected[1], strict=True))


# ---- the plain loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_loop_is_the_recursion(variant):
    net = task.Net()
    names = [name for name, _ in net.named_parameters()]

    def gradient(weights, step):
        weights = {name: w.detach().requires_grad_() for name, w in zip(names, weights, strict=True)}
        return list(torch.autograd.grad(functional_call(net, weights, task.batch(step)), list(weights.values())))

    norms = ["sign" if "head" in name else "rms" if "bias" in name else "spectral" for name in names]
    path = trajectory(
        variant, list(net.parameters()), gradient, range(task.STEPS), norms, [2.0 if n == "sign" else 1.0 for n in norms],
        lambda _: 0.05, lambda _: 0.9, lambda _: 0.2, decay=0.0,
    )  # fmt: skip
    _, weights = plain_pytorch.train(variant, polar="svd")
    for ours, theirs in zip(weights, path[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_fall(plain, variant):
    losses = plain[variant][0]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_variants_differ(plain):
    for variant in VARIANTS[1:]:
        assert_differ(plain[variant], plain["gluon"])


@pytest.mark.parametrize("variant", ["gluon", "mvr1"])
def test_bare_step(plain, variant):
    assert_same(plain_pytorch.train_with_bare_step(variant), plain[variant], losses=0)


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_bare_step_is_refused(variant):
    with pytest.raises(TypeError, match="needs a closure"):
        plain_pytorch.train_with_bare_step(variant)


# ---- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gluon", "mvr1"])
def test_trainer(plain, variant, tmp_path):
    trainer = framework("transformers", "huggingface_trainer")
    assert_same(trainer.train(variant, str(tmp_path)), plain[variant], FLOAT32)


def test_trainer_resumes_exactly(plain, tmp_path):
    trainer = framework("transformers", "huggingface_trainer")
    trainer.train("mvr1", str(tmp_path), save_strategy="steps", save_steps=task.STEPS // 2)
    resumed = trainer.train("mvr1", str(tmp_path), resume=str(tmp_path / f"checkpoint-{task.STEPS // 2}"))
    assert_same(resumed, plain["mvr1"], FLOAT32)


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_trainer_refuses_two_passes(variant, tmp_path):
    trainer = framework("transformers", "huggingface_trainer")
    with pytest.raises(TypeError, match="needs a closure"):
        trainer.train(variant, str(tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerate(plain, variant):
    loop = framework("accelerate", "accelerate_loop")
    assert_same(loop.train(variant), plain[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerates_own_step_takes_the_closure(plain, variant):
    loop = framework("accelerate", "accelerate_loop")
    accelerator = loop.Accelerator(cpu=True)
    net = task.Net()
    model = accelerator.prepare_model(net)
    optimizer = accelerator.prepare_optimizer(task.build(variant, net))
    losses = []
    for step in range(task.STEPS):
        seen = []

        def closure(step=step, seen=seen):
            optimizer.zero_grad()  # is ignored between the passes
            loss = model(*task.batch(step))
            accelerator.backward(loss)
            seen.append(loss.item())

        optimizer.step(closure)
        losses.append(seen[0 if variant == "mvr3" else -1])
    optimizer.optimizer.flush()
    assert_same((losses, list(net.parameters())), plain[variant])


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_accelerates_accumulate_is_refused(variant):
    loop = framework("accelerate", "accelerate_loop")
    accelerator = loop.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = task.Net()
    optimizer = accelerator.prepare_optimizer(task.build(variant, net))

    def micro_batch():
        accelerator.backward(net(*task.batch(0)))

    with accelerator.accumulate(net):
        micro_batch()
        optimizer.step(micro_batch)  # not yet
    assert optimizer.optimizer.updates == 0
    with accelerator.accumulate(net), pytest.raises(RuntimeError, match="gradients of an earlier pass"):
        optimizer.step(micro_batch)


# ---- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_manual(plain, variant):
    script = framework("lightning", "lightning_module")
    module = script.Manual(variant)
    trainer = script.fit(module)
    assert_same((module.losses, list(module.net.parameters())), plain[variant])
    assert trainer.global_step == task.STEPS


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_automatic(plain, variant):
    script = framework("lightning", "lightning_module")
    module = script.Automatic(variant)
    trainer = script.fit(module, task.ROWS)
    passes = {"mvr2": 2 * task.STEPS - 1, "mvr3": 2 * task.STEPS}.get(variant, task.STEPS)
    assert len(module.losses) == passes
    losses = {"mvr2": module.losses[:1] + module.losses[2::2], "mvr3": module.losses[::2]}.get(variant, module.losses)
    assert_same((losses, list(module.net.parameters())), plain[variant])
    assert trainer.global_step == task.STEPS


@pytest.mark.parametrize("variant", ["gluon", "mvr1"])
def test_lightning_automatic_accumulation(plain, variant):
    script = framework("lightning", "lightning_module")
    module = script.Automatic(variant)
    script.fit(module, accumulate_grad_batches=2)
    losses = [(a + b) / 2 for a, b in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert_same((losses, list(module.net.parameters())), plain[variant])


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_lightning_automatic_accumulation_is_refused(variant):
    script = framework("lightning", "lightning_module")
    with pytest.raises(RuntimeError, match="gradients of an earlier pass"):
        script.fit(script.Automatic(variant), accumulate_grad_batches=2)


@pytest.mark.parametrize("variant", ["mvr2", "mvr3"])
def test_lightning_bare_step_is_refused(variant):
    script = framework("lightning", "lightning_module")

    class Bare(script.Manual):
        def training_step(self, micro_batch, index):
            self.manual_backward(self.net(*micro_batch))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match="gradients of an earlier pass"):
        script.fit(Bare(variant))


@pytest.mark.parametrize("variant", ["mvr1", "mvr2", "mvr3"])
def test_lightning_resumes_exactly(plain, variant, tmp_path):
    script = framework("lightning", "lightning_module")
    half, kept = task.STEPS // 2, {}

    class Interrupted(script.Manual):
        def training_step(self, micro_batch, index):
            super().training_step(micro_batch, index)
            if self.global_step == half and not kept and not self.waiting:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")
                kept.update(weights=[p.detach().clone() for p in self.net.parameters()])

    script.fit(Interrupted(variant))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    module = script.Manual(variant)
    module.load_state_dict(saved["state_dict"])
    assert all(torch.equal(p, w) for p, w in zip(module.net.parameters(), kept["weights"], strict=True))
    optimizer = task.build(variant, module.net)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    losses = []
    for step in range(half, task.STEPS):

        def closure(step=step):
            loss = module.net(*task.batch(step))
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    optimizer.flush()
    assert_same((plain[variant][0][:half] + losses, list(module.net.parameters())), plain[variant])


# ---- several processes, and every script from the command line --------------------------------------------------------


def run_script(script, save, processes):
    """What a script prints; one that needs one process runs in this one, where torch is loaded already."""
    path = ROOT / "examples" / f"{script}.py"
    if processes == 1:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", [str(path), "--save", str(save)]):
            runpy.run_path(str(path), run_name="__main__")
        return printed.getvalue()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tests" / "shutdown.py"), str(path), "--save", str(save)]
    result = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("script", "processes", "package", "variants"),
    [
        ("plain_pytorch", 1, "torch", VARIANTS),
        ("huggingface_trainer", 1, "transformers", ("gluon", "mvr1")),
        ("accelerate_loop", 2, "accelerate", ("mvr2", "mvr3")),
        ("lightning_module", 1, "lightning", VARIANTS),
        ("ddp", 2, "torch", VARIANTS),
        ("fsdp2", 2, "torch", VARIANTS),
    ],
)
def test_script(plain, script, processes, package, variants, tmp_path):
    pytest.importorskip(package, reason=f"{package} is a test dependency (requirements-dev.txt) and is not installed")
    printed = run_script(script, tmp_path / "runs.pt", processes)
    runs = torch.load(tmp_path / "runs.pt")
    assert set(runs) == set(variants)
    for variant in variants:
        assert_same(runs[variant], plain[variant], FLOAT32 if script == "huggingface_trainer" else 1e-12)
        assert f"{variant}: loss" in printed
    if script == "ddp":
        steps = task.STEPS
        assert str({"gluon": steps, "mvr1": steps, "mvr2": steps, "mvr3": 2 * steps}) in printed
    if script == "fsdp2":
        assert "is refused: GluonMVR2: a pass left no gradient" in printed
