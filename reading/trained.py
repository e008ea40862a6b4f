"""Builds a trained model from a run's folder, one of its checkpoints, or the weights alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError
from data.shards import read_manifest
from model import GPT, GPTConfig
from training.checkpoint import list_checkpoints
from training.config import Config

WEIGHTS = "model.safetensors"
_SIZES = ("vocab_size", "n_layer", "n_head", "d_model", "seq_len")
GPT2_VOCABULARY, BYTES_VOCABULARY = 50257, 257


@dataclass(frozen=True)
class Trained:
    """A trained model and where it comes from. `config` holds the run's options as they were saved."""

    model: GPT
    config: dict[str, Any]
    weights: Path

    @property
    def name(self) -> str:
        """The run's name, and the step of a checkpoint."""
        name = self.config.get("run_name") or self.weights.parent.name
        return f"{name}/{self.weights.parent.name}" if self.weights.parent.parent.name == "checkpoints" else str(name)

    @property
    def encoding(self) -> str:
        """The encoding of its training data: "gpt2" or "bytes".

        It comes from the data's manifest if that still exists, else from the size of the model's vocabulary.
        Raises UserError if it is another one.
        """
        data_dir = self.config.get("data_dir")
        manifest = read_manifest(data_dir) if isinstance(data_dir, str) else None
        encoding = manifest.encoding if manifest is not None else None
        size = self.model.config.vocab_size
        if encoding is None:
            encoding = "gpt2" if size >= GPT2_VOCABULARY else "bytes" if size >= BYTES_VOCABULARY else f"of {size} tokens"
        if encoding not in ("gpt2", "bytes"):
            raise UserError(f"{self.weights}: its vocabulary ({encoding}) is neither GPT-2's nor bytes, so it has no text form")
        return encoding


def load_trained(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Trained:
    """The model at a path, ready for inference.

    The path is a run's folder (its final weights, else its newest checkpoint), a checkpoint's folder, or a
    model.safetensors with its config.json or state.json next to it. Raises UserError if nothing can be loaded.
    """
    weights = find_weights(path)
    config = _saved_config(weights)
    model = GPT(_sizes(config, weights))
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} can't be read ({' '.join(str(error).split())}); the file is damaged") from None
    except RuntimeError as error:  # names or shapes differ
        raise UserError(f"{weights} belongs to another model: {str(error).splitlines()[-1].strip()}") from None
    return Trained(model.to(device, dtype).eval(), config, weights)


def find_weights(path: Path) -> Path:
    """The model.safetensors that a path leads to. Raises UserError if there is none."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file; give a run's folder, a checkpoint or a {WEIGHTS}")
        return path
    if not path.exists():
        raise UserError(f"{path}: there is no such run or checkpoint; give a folder such as runs/run")
    for candidate in (path, *list_checkpoints(path / "checkpoints")):
        if (candidate / WEIGHTS).is_file():
            return candidate / WEIGHTS
    raise UserError(f"{path} holds no {WEIGHTS} and no checkpoint; the run may not have reached its first one yet")


def _saved_config(weights: Path) -> dict[str, Any]:
    """The options of the run that made the weights, from config.json or a checkpoint's state.json next to them."""
    for name in ("config.json", "state.json"):
        path = weights.parent / name
        try:
            saved = json.loads(path.read_bytes())
            config = saved["config"] if name == "state.json" else saved
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} can't be read; the file is damaged") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no options; the file is damaged")
        return config
    raise UserError(f"{weights} has no config.json or state.json next to it, which give the model's sizes; copy one there")


def _sizes(config: dict[str, Any], weights: Path) -> GPTConfig:
    if missing := [name for name in _SIZES if name not in config]:
        raise UserError(f"{weights}: the config next to it has no {missing[0]}; it belongs to another model")
    sizes = Config.from_dict({name: config[name] for name in _SIZES}, f"{weights.parent}'s config")
    return GPTConfig(**{name: getattr(sizes, name) for name in _SIZES})
