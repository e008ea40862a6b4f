"""Small runs with random weights, in the trainer's format, for tests of the scripts that read a trained model."""

import json

import torch

from model import GPT, GPTConfig
from training.checkpoint import save_weights
from training.config import Config

SIZES = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32}


def random_model(seed=0, **sizes):
    """A GPT without zero weights, so that every part of it affects the logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"vocab_size": 257, **SIZES, **sizes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def write_run(folder, seed=0, val_loss=2.0, **options):
    """Write the folder of a finished run of such a model, with a byte vocabulary by default."""
    sizes = {"vocab_size": 257, **SIZES} | {key: value for key, value in options.items() if key in ("vocab_size", *SIZES)}
    folder.mkdir(parents=True)
    save_weights(folder / "model.safetensors", random_model(seed, **sizes))
    config = Config(**{"run_name": folder.name, "data_dir": str(folder / "no_data"), **sizes, **options})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    record = {"update": 1, "tokens": 1, "passes": 1, "seconds": 1.0, "val_loss": val_loss}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder
