"""Lightning with manual optimization, for every variant.

    pip install lightning
    python examples/lightning_module.py

With manual optimization, as in `Manual` below, the closure holds the loop over the micro-batches, and everything works.

Lightning's *automatic* optimization gives `step` a closure of its own, which evaluates the current micro-batch alone. Every
variant works this way, on two conditions:

- accumulate_grad_batches must be 1. A pass of these optimizers starts by dropping what is in .grad, and with it the gradients
  of the earlier micro-batches. So `Automatic` below refuses any other value.
- with two passes, gradient_clip_val must be off, because it would clip each pass by itself. `Automatic` refuses it as well.

Under DDP each rank keeps a share of the momentum, and Lightning saves the first rank's `state_dict()`, which raises a
RuntimeError. `on_save_checkpoint` below saves `full_state_dict()` instead, which resumes on any number of ranks.
"""

import logging
import os
import warnings
from typing import Any

import lightning
import torch
from task import MICRO, OPTIMIZERS, STEPS, TWO_PASSES, Net, batch, build, finish
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class WholeState(lightning.LightningModule):
    """Saves the whole momentum, from every rank."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = [optimizer.full_state_dict() for optimizer in self.trainer.optimizers]


class Manual(WholeState):
    """Collects the micro-batches of a step, then evaluates them as often as the optimizer asks."""

    def __init__(self, variant: str, accumulate: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.variant, self.accumulate = variant, accumulate
        self.net, self.losses, self.waiting = Net(), [], []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build(self.variant, self.net)

    def training_step(self, micro_batch: list[Tensor], index: int) -> None:
        self.waiting.append(micro_batch)
        if len(self.waiting) < self.accumulate:
            return

        def closure() -> Tensor:
            self.optimizers().zero_grad()
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for x, y in self.waiting:
                loss = self.net(x, y) / self.accumulate
                self.manual_backward(loss)
                total += loss.detach()
            return total

        self.losses.append(self.optimizers().step(closure=closure).item())
        self.waiting.clear()

    def on_train_end(self) -> None:
        self.optimizers().flush()  # MVR-1, -2 and -3 hold their last update back


class Automatic(WholeState):
    """Automatic optimization, as in most existing code."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant, self.net, self.losses = variant, Net(), []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError("accumulate_grad_batches must be 1: accumulate inside the closure, as `Manual` does")
        if self.trainer.gradient_clip_val and self.variant in TWO_PASSES:
            raise ValueError("gradient_clip_val must be off: it would clip each of the two passes by itself")
        return build(self.variant, self.net)

    def training_step(self, micro_batch: list[Tensor], index: int) -> Tensor:
        loss = self.net(*micro_batch)
        self.losses.append(loss.item())
        return loss

    def on_train_end(self) -> None:
        self.optimizers().flush()


def fit(module: Manual | Automatic, rows: int = MICRO, resume: str | None = None, **options: Any) -> lightning.Trainer:
    """Train a module, by default on all steps once, with `rows` samples per micro-batch."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    x, y = (torch.cat(parts)[rank::world] for parts in zip(*map(batch, range(STEPS)), strict=True))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    usual = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": world,
        "use_distributed_sampler": False,
    }  # each rank has its rows
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(**{**usual, **quiet, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few loader workers
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=rows), ckpt_path=resume)
    return trainer


def train(variant: str) -> tuple[list[float], list[Tensor]]:
    """The losses of every step (at the weights that the model then holds), and the final weights."""
    module = Manual(variant)
    fit(module)
    return module.losses, [p.detach() for p in module.net.parameters()]


if __name__ == "__main__":
    finish({variant: train(variant) for variant in OPTIMIZERS})
