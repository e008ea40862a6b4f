"""Lightning with manual optimization, for every variant.

    pip install lightning
    python examples/lightning_module.py

With manual optimization, as in `Manual` below, the closure holds the loop over the micro-batches, and everything works.

Lightning's *automatic* optimization gives `step` a closure of its own, which evaluates the current micro-batch alone. Every
variant works this way, on two conditions:

- accumulate_grad_batches must be 1. A pass of these optimizers starts by dropping what is in .grad, and with it the gradients
  of the earlier micro-batches. So `Automatic` below refuses any other value.
- leave gradient_clip_val off. It would clip each pass by itself, and the size of a step does not depend on the gradient's.
"""

import logging
import warnings
from typing import Any

import lightning
import torch
from task import MICRO, OPTIMIZERS, STEPS, Net, batch, build, finish
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Manual(lightning.LightningModule):
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


class Automatic(lightning.LightningModule):
    """Automatic optimization, as in most existing code."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant, self.net, self.losses = variant, Net(), []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.accumulate_grad_batches > 1:
            raise ValueError("accumulate_grad_batches must be 1: accumulate inside the closure, as `Manual` does")
        return build(self.variant, self.net)

    def training_step(self, micro_batch: list[Tensor], index: int) -> Tensor:
        loss = self.net(*micro_batch)
        self.losses.append(loss.item())
        return loss

    def on_train_end(self) -> None:
        self.optimizers().flush()


def fit(module: Manual | Automatic, rows: int = MICRO, resume: str | None = None, **options: Any) -> lightning.Trainer:
    """Train a module on all steps once, with `rows` samples per micro-batch."""
    x, y = (torch.cat(parts) for parts in zip(*map(batch, range(STEPS)), strict=True))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **{**quiet, **options})
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
