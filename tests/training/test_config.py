"""The options: what loads, and what is refused with which message."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from training.config import OPTIMIZERS, OPTIONS, Config, kind_of, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
EXPECTED = {f"{name}_b512" for name in (*OPTIMIZERS, "scion")}
EXPECTED |= {"gluon_b128", "mvr1_b128", "mvr1_b512_gamma01", "mvr3_b512_beta08", "muon_theorem1"}
EXPECTED |= {f"quickstart_{name}" for name in ("gluon", "mvr1", "mvr2", "mvr3")}
EXPECTED.add("mini_gluon")


def changed(config: Config) -> dict:
    """The options that differ from the defaults."""
    return {name: value for name, value in config.to_dict().items() if value != OPTIONS[name].default}


def refusal(action, *arguments) -> str:
    """The message of the UserError that the action must raise; it must be one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert message and message.splitlines() == [message]
    assert message.isprintable() or not message.isascii()
    return message


@pytest.fixture
def config_file(tmp_path):
    def write(text: str, name: str = "mine.py") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# What loads


def test_configs_are_complete():
    assert {path.stem for path in CONFIGS} == EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_sets_only_what_differs_and_round_trips(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the working directory does not matter
    config = load_config(["--config", str(path)])
    assert config.run_name == path.stem
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    stated = [node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    assert len(stated) == len(set(stated)) and set(stated) <= set(changed(config))
    assert path.read_text().startswith('"""')


def loaded(name: str) -> Config:
    return load_config(["--config", str(ROOT / "configs" / f"{name}.py")])


@pytest.mark.parametrize("number, more", [("1", {"momentum"}), ("2", set()), ("3", {"momentum"})])
def test_quickstarts_differ_only_in_the_optimizer(number, more):
    base, other = loaded("quickstart_gluon").to_dict(), loaded(f"quickstart_mvr{number}").to_dict()
    assert {key for key in base if base[key] != other[key]} == {"run_name", "optimizer"} | more
    assert other["optimizer"] == f"mvr{number}"


def test_readings_of_figure_4():
    for name, momentum in (("mvr3_b512", 0.2), ("mvr3_b512_beta08", 0.8)):
        config = loaded(name)
        assert (config.optimizer, config.lr, config.momentum, config.q, config.gamma, config.batch_size) == (
            "mvr3", 3.6e-4, momentum, 0.5, None, 512
        )  # fmt: skip


def test_muon_theorem1_meets_the_conditions_of_theorem_1():
    config = loaded("muon_theorem1")
    momentum = 0.9 if config.momentum is None else config.momentum  # GluonMVR1's own, as is gamma = 1
    alpha, beta, eta = 1 - momentum, config.lr * config.weight_decay, config.lr * config.block_radius
    assert (config.optimizer, config.gamma, config.block_norm, config.embed_norm) == ("mvr1", None, "spectral", "sign")
    assert alpha >= beta > 0
    assert eta >= beta * config.block_radius * (1 - 1e-12)  # the weights' norm is at most the radius


def test_defaults():
    assert load_config([]) == Config()
    assert Config().run_name == "run" and changed(Config()) == {}
    for opt in OPTIONS.values():
        assert opt.type == (kind_of(opt) | None if opt.default is None else type(opt.default)) and opt.metadata["help"]


def test_command_line_overrides_the_file(config_file):
    path = config_file("lr = 1\nsteps = 7\nwandb = True\n_helper = 3\n")
    config = load_config(["--config", path, "--steps", "9", "--no-wandb"])
    assert changed(config) == {"run_name": "mine", "lr": 1.0, "steps": 9}
    assert type(config.lr) is float


def test_an_option_overrides_a_wrong_value_in_the_file(config_file):
    assert load_config(["--config", config_file("steps = 0"), "--steps", "3"]).steps == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--run-name a", {"run_name": "a"}),
        ("--run_name a", {"run_name": "a"}),
        ("--run_name=a_b", {"run_name": "a_b"}),
        ("--wandb", {"wandb": True}),
        ("--wandb true", {"wandb": True}),
        ("--wandb=True", {"wandb": True}),
        ("--wandb false", {}),
        ("--no-wandb", {}),
        ("--wandb --lr 2", {"wandb": True, "lr": 2.0}),
        ("--lr 1e-3 --gamma 0", {"lr": 1e-3, "gamma": 0.0}),
        ("--resume auto", {"resume": "auto"}),
        ("--optimizer mvr2 --q 1", {"optimizer": "mvr2", "q": 1.0}),
        ("--optimizer torch.optim:Muon", {"optimizer": "torch.optim:Muon"}),
        ("--optimizer muon_mvr --compare-with previous_batch", {"optimizer": "muon_mvr", "compare_with": "previous_batch"}),
        ('--optimizer-options {"nesterov":false}', {"optimizer_options": {"nesterov": False}}),
        ('--embed_options={"norm":"adamw","betas":[0.9,0.95]}', {"embed_options": {"norm": "adamw", "betas": [0.9, 0.95]}}),
        ("--bias-correction false --momentum 0.9", {"bias_correction": False, "momentum": 0.9}),
        ("--no-bias-correction", {"bias_correction": False}),
        ("--bias-correction", {"bias_correction": True}),
        ("--schedule linear --steps 10", {"schedule": "linear", "steps": 10}),  # shorter than the warm-down
        ("--text sotu --data-dir x", {"text": "sotu", "data_dir": "x"}),
    ],
)
def test_command_line(words, expected):
    assert changed(load_config(words.split())) == expected


def test_file_may_use_all_of_python(config_file):
    text = """
from __future__ import annotations
import math
from pathlib import Path
def double(x): return 2 * x
class Thing: pass
_base = 1e-3
lr = double(_base) * math.sqrt(4)
"""
    assert changed(load_config(["--config", config_file(text)])) == {"run_name": "mine", "lr": 4e-3}


def test_options_of_an_optimizer_are_plain_values(config_file):
    """A tuple becomes a list, as in JSON, so that a saved config equals the one that was loaded."""
    config = load_config(["--config", config_file("optimizer_options = {'betas': (0.9, 0.95), 'fused': None}")])
    assert config.optimizer_options == {"betas": [0.9, 0.95], "fused": None}
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_file_may_start_from_another_in_its_folder(config_file):
    config_file("steps = 5\nlr = 1.0", "the_base_of_this_test.py")
    path = config_file("from the_base_of_this_test import *\nlr = 2.0")
    before = list(sys.path)
    assert changed(load_config(["--config", path])) == {"run_name": "mine", "steps": 5, "lr": 2.0}
    assert sys.path == before


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    parts = [" ".join(part.split()) for part in text.split("\n  --")[1:]]
    for opt in OPTIONS.values():
        [part] = [part for part in parts if part.split()[0] == opt.name.replace("_", "-")]
        assert opt.metadata["help"] in part
        default = "the optimizer's own" if opt.default is None else str(opt.default)
        assert opt.default == "" or f"[{default.lower() if opt.type is bool else default}]" in part


def test_config_is_frozen_and_needs_no_torch():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1
    program = "import sys, training.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_missing_options_of_a_saved_config_are_defaults():
    assert Config.from_dict({"lr": 1}) == Config(lr=1.0)
    assert Config.from_dict({"bucket_cap_mb": 0}) == Config()  # an option that runs of before had


# What is refused: the command line, and the words that its message must contain

WRONG_COMMAND_LINES = [
    ("--lrr 1", "--lrr did you mean --lr?"),
    ("--momentun 0.9", "--momentun did you mean --momentum?"),
    ("--mom 0.9", "unknown option --mom"),  # no abbreviations
    ("--no-lr", "unknown option --no-lr"),
    ("--zzzzzzzzz 1", "unknown option --zzzzzzzzz --help"),
    ("--lr", "--lr expected one argument"),
    ("--lr --steps 3", "--lr expected one argument"),
    ("--config", "--config expected one argument"),
    ("--lr 1 --lr 1", "--lr 2 times"),
    ("--run-name a --run_name b", "--run-name 2 times"),
    ("--wandb --no-wandb", "--wandb 2 times"),
    ("--config a.py --config b.py", "--config 2 times"),
    ("lr 1", "'lr' --key value"),
    ("-lr 1", "'-lr' --key value"),
    ("--lr 1 2", "'2' --key value"),
    ("--no-wandb=1", "--no-wandb '1'"),
    ("--wandb maybe", "--wandb True or False 'maybe'"),
    ("--lr fast", "--lr number 'fast'"),
    ("--lr nan", "--lr finite nan"),
    ("--lr inf", "--lr finite inf"),
    ("--lr -1", "--lr of at least 0 -1.0"),
    ("--lr -1e-3", "--lr"),
    ("--momentum 1", "--momentum below 1 1.0"),
    ("--momentum -0.1", "--momentum of at least 0"),
    ("--gamma -1", "--gamma of at least 0"),
    ("--gamma inf", "--gamma finite"),
    ("--q 0", "--q above 0 and of at most 1, not 0.0"),
    ("--q 1.5", "--q of at most 1"),
    ("--q none", "--q number 'none'"),
    ("--confg configs/mvr1_b512.py", "unknown option '--confg'; did you mean --config?"),
    ("--inner 0.5", "unknown option '--inner'"),
    ("--compare-with previous_weights", "compare_with = previous_weights needs optimizer = muon_mvr, not gluon"),
    ("--optimizer muon_mvr --compare-with previous", "--compare-with one of last_step, previous_batch, previous_weights"),
    ("--optimizer-options nesterov", "--optimizer-options option names 'nesterov'"),
    ("--optimizer-options [1]", "--optimizer-options option names [1]"),
    ('--optimizer-options {"a-b":1}', "--optimizer-options option names {'a-b': 1}"),
    ('--embed-options {"lr":NaN}', "--embed-options option names nan"),
    ("--weight-decay -1", "--weight-decay of at least 0"),
    ("--block-radius 0", "--block-radius above 0"),
    ("--eps 0", "--eps above 0"),
    ("--beta2 1", "--beta2 below 1"),
    ("--steps 1e3", "--steps integer '1e3'"),
    ("--steps 10.0", "--steps integer '10.0'"),
    ("--steps 0", "--steps of at least 1, not 0"),
    ("--steps 99999999999999999999", "--steps below 2**63"),
    ("--batch-size 0", "--batch-size of at least 1"),
    ("--seq-len -5", "--seq-len of at least 1"),
    ("--seed -1", "--seed of at least 0"),
    ("--val-tokens 0", "--val-tokens of at least 1"),
    ("--val-every 0", "--val-every of at least 1"),
    ("--checkpoint-every -1", "--checkpoint-every of at least 0"),
    ("--keep-checkpoints 0", "--keep-checkpoints of at least 1"),
    ("--n-head 5", "d_model = 768 multiple of 2 * n_head = 10"),
    ("--d-model 6", "d_model = 6 multiple of 2 * n_head = 12 rotary"),  # heads of size 1
    ("--optimizer mvr4", "optimizer one of gluon, muon_mvr, adamw, or package.module:Class, not 'mvr4'; did you mean mvr"),
    ("--optimizer Gluon", "optimizer did you mean gluon?"),
    ("--block-norm spektral", "--block-norm did you mean spectral?"),
    ("--polar polarexpress", "--polar did you mean polar_express?"),
    ("--device gpu", "--device one of auto, cuda, cpu, mps did you mean"),
    ("--dtype fp16", "--dtype one of auto, float32, bfloat16, float64"),
    ("--schedule cosine", "--schedule one of constant, linear, theory"),
    ("--text tinystories", "--text one of '', sotu"),
    ("--text sotu", "text = sotu data_dir data/sotu_bytes"),
    ("--text sotu --data-dir x --vocab-size 256", "vocab_size = 257 256"),
    ("--run-name a/b", "--run-name no slash 'a/b'"),
    ("--run-name a\\b", "--run-name no slash"),
    ("--run-name ..", "--run-name '..'"),
    ("--run-name .", "--run-name"),
    ("--run-name=", "--run-name ''"),
    ("--run-name " + "x" * 300, "--run-name 200 bytes"),
    ("--results-dir=", "--results-dir not empty"),
    ("--data-dir a\0b", "--data-dir printable"),
    ("--run-name a\udc80", "--run-name"),
    ("--config=", "config file ''"),
    ("--config nowhere/mvr1_b512.py", "no config file nowhere/mvr1_b512.py did you mean configs/mvr1_b512.py?"),
    ("--config configs/mvr1_b51.py", "no config file did you mean configs/mvr1_b512.py?"),
    ("--config configs/mvr1_b512", "no config file did you mean configs/mvr1_b512.py?"),
    ("--config configs", "no config file configs"),
    ("--config pyproject.toml", "pyproject.toml not a Python file .py"),
    ("--config zzz" + "z" * 5000, "no config file configs/gluon_b512.py"),
]


@pytest.mark.parametrize("words, expected", WRONG_COMMAND_LINES, ids=[words[:40] for words, _ in WRONG_COMMAND_LINES])
def test_wrong_command_line(words, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = refusal(load_config, words.split(" "))
    assert all(word in message for word in expected.split()), message


@pytest.mark.parametrize("name", [" ", "  \t", " a", "a\n", "a\nb"])
def test_wrong_run_name(name):
    assert "folder name" in refusal(load_config, ["--run-name", name])


# What is refused: the config file

WRONG_FILES = [
    ("momentun = 0.9", "mine.py: unknown option 'momentun' did you mean momentum?"),
    ("learning_rate = 1", "mine.py: unknown option 'learning_rate'"),
    ("Steps = 1", "unknown option 'Steps' did you mean steps?"),
    ("config = 'x.py'", "unknown option 'config'"),
    ("helper = 3", "unknown option 'helper'"),
    ("from pathlib import Path\nhere = Path('x')", "unknown option 'here'"),
    ("lr = '1e-3'", "mine.py: lr finite number '1e-3'"),
    ("lr = None", "lr None"),
    ("lr = True", "lr True"),
    ("lr = [1e-3]", "lr [0.001]"),
    ("lr = 1j", "lr 1j"),
    ("lr = float('nan')", "lr finite nan"),
    ("lr = -float('inf')", "lr finite -inf"),
    ("lr = 10 ** 400", "lr finite 1000"),
    ("lr = 10 ** 9000", "lr finite this int"),
    ("lr = int", "lr <class 'int'>"),
    ("import math as lr", "lr <module"),
    ("steps = 1e3", "steps integer 1000.0"),
    ("steps = True", "steps integer True"),
    ("steps = '10'", "steps integer '10'"),
    ("steps = -1", "steps of at least 1 -1"),
    ("steps = 10 ** 9000", "steps below 2**63"),
    ("wandb = 1", "wandb True or False 1"),
    ("wandb = 'true'", "wandb True or False 'true'"),
    ("optimizer = 3", "mine.py: optimizer text 3"),
    ("optimizer = 'Muon'", "optimizer one of 'Muon'"),
    ("optimizer = b'gluon'", "optimizer b'gluon'"),
    ("run_name = '../x'", "run_name no slash"),
    ("run_name = ''", "run_name ''"),
    ("run_name = None", "run_name None"),
    ("data_dir = ''", "data_dir not empty"),
    ("data_dir = 'a\\nb'", "data_dir printable 'a\\nb'"),
    ("n_head = 7", "d_model = 768 multiple"),
    ("momentum_end = 0.99", "mine.py: unknown option 'momentum_end' did you mean momentum?"),
    ("momentum = 'high'", "mine.py: momentum finite number 'high'"),
    ("optimizer_options = ['nesterov']", "mine.py: optimizer_options option names ['nesterov']"),
    ("optimizer_options = {1: 2}", "mine.py: optimizer_options option names"),
    ("optimizer_options = {'foreach': print}", "mine.py: optimizer_options option names"),
    ("\nlr = ", "mine.py, line 2: invalid syntax"),
    ("if True:\nlr = 1", "mine.py, line 2: indented block"),
    ("lr = 1\nsteps = 1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
    ("lr = nan", "mine.py, line 1: NameError 'nan'"),
    ("import nothing_of_this_name", "mine.py, line 1: ModuleNotFoundError"),
    ("exit(3)", "mine.py, line 1: SystemExit"),
    ("raise ValueError('a\\nb')", "line 1: ValueError: a b"),
    ("def f(): f()\nf()", "mine.py, line 1: RecursionError"),
    ("class Bad(Exception):\n  def __str__(self): raise self\nraise Bad", "line 3 Bad"),
    ("class Bad:\n  def __repr__(self): 1 / 0\nlr = Bad()", "lr this Bad"),
    ("class Bad:\n  def __repr__(self): return 'x\\ny'\nlr = Bad()", "lr x y"),
    (b"lr = 1\0", "mine.py"),
    (b"run_name = '\xff'", "mine.py utf-8"),
    ("lr = " + "(" * 300 + ")" * 300, "mine.py"),
]


@pytest.mark.parametrize("text, expected", WRONG_FILES, ids=[str(text)[:40] for text, _ in WRONG_FILES])
def test_wrong_file(text, expected, config_file):
    message = refusal(load_config, ["--config", config_file(text)])
    assert all(word in message for word in expected.split()), message


def test_wrong_file_names(config_file):
    assert "run_name" in refusal(load_config, ["--config", config_file("", " .py")])
    config_file("", "gluon_small.py")
    path = config_file("", "other.py").replace("other", "gluon_smal")
    assert refusal(load_config, ["--config", path]).endswith("gluon_small.py?")


# What is refused: a saved config

WRONG_SAVED = [
    ({"lrr": 1}, "the saved config: unknown option 'lrr' did you mean lr?"),
    ({3: 1}, "the saved config: unknown option '3'"),
    ({"lr": "1"}, "the saved config: lr '1'"),
    ({"lr": None}, "lr None"),
    ({"steps": 1.0}, "steps integer 1.0"),
    ({"n_head": 5}, "n_head = 10"),
    ([], "option names []"),
    (None, "option names None"),
]


@pytest.mark.parametrize("values, expected", WRONG_SAVED, ids=str)
def test_wrong_saved_config(values, expected):
    message = refusal(Config.from_dict, values)
    assert all(word in message for word in expected.split()), message


def test_the_constructor_checks_too():
    assert "steps" in refusal(lambda: Config(steps=0))
    assert "lr" in refusal(lambda: dataclasses.replace(Config(), lr=-1))
