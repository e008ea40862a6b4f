"""What a resumed run takes over from its checkpoint: its options, and the data that it must go on with."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from training.config import Config
from training.inputs import Identity
from training.optimizers import linear_factor
from training.run_folder import is_in

# A resume that names another value of one of these is another experiment, and refused.
_FIXED = (
    "seed", "shuffle", "batch_size", "seq_len", "vocab_size", "n_layer", "n_head", "d_model", "optimizer", "compare_with",
    "block_norm", "embed_norm", "param_groups",
)  # fmt: skip
# These say where and how this launch runs, and are never taken over.
_OF_THE_LAUNCH = ("run_name", "results_dir", "overwrite", "resume", "other_data", "device", "rank_timeout")


def own_options(run_dir: Path, config: Config, source: Path | None, state: dict[str, Any] | None) -> tuple[Config, list[str]]:
    """The options of a run that starts from this checkpoint, and a line for each thing that the user should know of them.

    Options on the command line replace the run's own, and so does every option of a config that was built in Python. A config
    file describes how the run starts: when the run itself goes on, it keeps its own values. When another run starts from the
    checkpoint, the file counts as the command line does. Options that nobody named keep the run's own values.
    Raises UserError if the checkpoint belongs to another experiment, or for options that don't go together.
    """
    if source is None or state is None:
        config.check_together()
        return config, []
    origin = f"{source}'s config"
    saved = Config.from_dict(state["config"], origin)
    before, values, step = saved.to_dict(), config.to_dict(), state["step"]
    notes, kept = [], []
    for name, value in values.items():
        own = before[name]
        if value == own or name in _OF_THE_LAUNCH:
            continue
        label = "" if config.named is None else config.named.get(name)
        if label is not None and name in _FIXED:
            raise UserError(f"{source} was trained with {name} = {own}, not {value}: a resume can't change that")
        if label is None:
            values[name] = own
        elif label and not label.startswith("--") and is_in(source, run_dir):  # the config file names it
            values[name] = own
            kept.append(f"{name} = {_shown(own)}, not {_shown(value)}")
        else:
            notes.append(f"{name} = {_shown(value)} in place of {_shown(own)} from step {step} on")
    if kept:
        notes.append(f"kept, unlike in the config file: {'; '.join(kept)} (the command line can change them)")
    config = Config.from_dict(values, origin)
    config.check_together()
    if step > config.steps:
        raise UserError(f"{source} is at step {step}, past --steps {config.steps}")
    return config, notes + _of_schedule(saved, config, step)


def _shown(value: Any) -> str:
    return "the optimizer's own" if value is None else str(value) if value != "" else "''"


def _of_schedule(saved: Config, config: Config, step: int) -> list[str]:
    """A line if the lr jumps because a linear schedule ends at another step than before."""
    last = max(0, step - 1)
    if saved.schedule != "linear" or config.schedule != "linear" or linear_factor(saved, last) == linear_factor(config, last):
        return []
    old, new = saved.lr * linear_factor(saved, last), config.lr * linear_factor(config, min(step, config.steps - 1))
    return [
        f"the linear schedule now ends at step {config.steps}, not {saved.steps}: lr goes from {old:.3g} "
        f"{'back ' * (new > old)}to {new:.3g}"
    ]


def check_data(config: Config, source: Path | None, state: dict[str, Any] | None, data: Identity) -> list[str]:
    """Compare the data with those of the checkpoint. Returns a line if they differ and may.

    Shards may have been added at the end, or be missing there: `open_data` checks that there are enough. But with `shuffle` the
    order depends on the number of all sequences.
    Raises UserError if the data differ and `other_data` is not set.
    """
    if source is None or state is None or state.get("data") is None:
        return []
    try:
        differences = [
            f"{Path(config.data_dir) / found}"
            for split, shards in data.items()
            if (found := _difference(state["data"][split], shards, config.shuffle and split == "train"))
        ]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{source} can't be read as a checkpoint (its data are malformed)") from None
    if not differences:
        return []
    if not config.other_data:
        raise UserError(
            f"{source} was trained on other data: {differences[0]}; give --data-dir the run's own, or --other-data to go on "
            "with these"
        )
    return [f"other data from step {state['step']} on: {'; '.join(differences)}"]


def _difference(saved: dict[str, str], shards: dict[str, str], counted: bool) -> str:
    """How shards differ from saved ones, "" if they do not. `counted`: their number must be the same."""
    for (old, old_mark), (name, mark) in zip(saved.items(), shards.items(), strict=False):
        if name != old:
            return f"{name} is in the place of {old}"
        if mark != old_mark:
            return f"{name} holds other tokens"
    if counted and len(saved) != len(shards):
        return f"*: {len(shards)} train shards in place of {len(saved)}, which --shuffle puts into another order"
    return ""
