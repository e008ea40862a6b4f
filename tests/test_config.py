"""The options: what loads, what is refused and in which words."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from training.config import OPTIONS, Config, load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
EXPECTED = {f"{name}_b512" for name in ("gluon", "mvr1", "mvr2", "mvr3", "scion", "adamw")}
EXPECTED |= {"gluon_b128", "mvr1_b128", "mvr3_b512_beta02", "mvr3_b512_nested", "muon_mvr"}
EXPECTED |= {f"quickstart_{name}" for name in ("gluon", "mvr1", "mvr2", "mvr3")}


def changed(config: Config) -> dict:
    """What differs from the defaults."""
    return {name: value for name, value in config.to_dict().items() if value != OPTIONS[name].default}


def refusal(action, *arguments) -> str:
    """The message of the UserError that must come, held to one line."""
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
def test_config_states_only_what_differs_and_round_trips(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever the folder
    config = load_config(["--config", str(path)])
    assert config.run_name == path.stem
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    stated = [node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    assert len(stated) == len(set(stated)) and set(stated) <= set(changed(config))
    assert path.read_text().startswith('"""')


def test_quickstarts_differ_in_the_optimizer_alone():
    base = load_config(["--config", str(ROOT / "configs/quickstart_gluon.py")]).to_dict()
    for number in "123":
        other = load_config(["--config", str(ROOT / f"configs/quickstart_mvr{number}.py")]).to_dict()
        assert {key for key in base if base[key] != other[key]} == {"run_name", "optimizer"}
        assert other["optimizer"] == f"mvr{number}"


def test_readings_of_figure_4():
    names = ("mvr3_b512", "mvr3_b512_beta02", "mvr3_b512_nested")
    a, b, c = (load_config(["--config", str(ROOT / "configs" / f"{name}.py")]) for name in names)
    assert (a.optimizer, a.lr, a.momentum, a.gamma, a.inner, a.batch_size) == ("mvr3", 3.6e-4, 0.8, 0.5, 0, 512)
    assert (b.optimizer, b.lr, b.momentum, b.gamma, b.inner, b.batch_size) == ("mvr3", 3.6e-4, 0.2, 0.5, 0, 512)
    assert (c.optimizer, c.lr, c.momentum, c.inner, c.batch_size) == ("mvr2", 3.6e-4, 0.8, 0.5, 512)


def test_muon_mvr_meets_the_conditions_of_theorem_1():
    config = load_config(["--config", str(ROOT / "configs/muon_mvr.py")])
    alpha, beta, eta = 1 - config.momentum, config.lr * config.weight_decay, config.lr * config.block_radius
    assert (config.optimizer, config.gamma, config.block_norm, config.embed_norm) == ("mvr2", 1, "spectral", "sign")
    assert alpha >= beta > 0
    assert eta >= beta * config.block_radius * (1 - 1e-12)  # the weights' norm is at most the radius


def test_defaults():
    assert load_config([]) == Config()
    assert Config().run_name == "run" and changed(Config()) == {}
    assert all(opt.type is type(opt.default) and opt.metadata["help"] for opt in OPTIONS.values())


def test_command_line_overrides_the_file(config_file):
    path = config_file("lr = 1\nsteps = 7\nwandb = True\n_helper = 3\n")
    config = load_config(["--config", path, "--steps", "9", "--no-wandb"])
    assert changed(config) == {"run_name": "mine", "lr": 1.0, "steps": 9}
    assert type(config.lr) is float


def test_an_override_mends_a_wrong_value_of_the_file(config_file):
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
        ("--optimizer mvr2 --inner 1", {"optimizer": "mvr2", "inner": 1.0}),
        ("--schedule linear --steps 10", {"schedule": "linear", "steps": 10}),  # shorter than the warm-down
        ("--schedule linear --momentum-end 1", {"schedule": "linear", "momentum_end": 1.0}),
        ("--momentum-end -1 --gamma-end=-1", {}),
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


def test_file_may_start_from_another_beside_it(config_file):
    config_file("steps = 5\nlr = 1.0", "the_base_of_this_test.py")
    path = config_file("from the_base_of_this_test import *\nlr = 2.0")
    before = list(sys.path)
    assert changed(load_config(["--config", path])) == {"run_name": "mine", "steps": 5, "lr": 2.0}
    assert sys.path == before


def test_help_has_one_line_per_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for opt in OPTIONS.values():
        flag = "--" + opt.name.replace("_", "-")
        [line] = [line for line in lines if line.split()[:1] == [flag]]
        assert opt.metadata["help"] in line
        assert opt.default == "" or (str(opt.default).lower() if opt.type is bool else str(opt.default)) in line


def test_config_is_frozen_and_needs_no_torch():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1
    program = "import sys, training.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_missing_options_of_a_saved_config_are_defaults():
    assert Config.from_dict({"lr": 1}) == Config(lr=1.0)


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
    ("--inner 1.5", "--inner of at most 1"),
    ("--inner 0.5", "inner optimizer = mvr2 gluon"),
    ("--optimizer mvr3 --inner 0.5", "inner optimizer = mvr2 mvr3"),
    ("--schedule linear --momentum-end 1.1", "--momentum-end of at most 1"),
    ("--schedule linear --momentum-end -0.5", "momentum_end at least 0, or -1 where momentum stays, not -0.5"),
    ("--schedule linear --optimizer mvr1 --gamma-end -2", "gamma_end at least 0, or -1 where gamma stays, not -2"),
    ("--momentum-end 0.99", "momentum_end = 0.99 needs schedule = linear constant"),
    ("--optimizer mvr2 --schedule theory --gamma-end 1", "gamma_end = 1.0 needs schedule = linear theory"),
    ("--schedule linear --gamma-end 1", "gamma_end = 1.0 needs gluon mvr1"),
    ("--schedule linear --optimizer mvr2 --inner 0.5 --gamma-end 1", "gamma_end = 1.0 inner"),
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
    ("--optimizer mvr4", "--optimizer one of gluon, mvr1, mvr2, mvr3, adamw 'mvr4' did you mean mvr"),
    ("--optimizer Gluon", "--optimizer did you mean gluon?"),
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
    ("optimizer = 3", "optimizer one of 3"),
    ("optimizer = 'Muon'", "optimizer one of 'Muon'"),
    ("optimizer = b'gluon'", "optimizer b'gluon'"),
    ("run_name = '../x'", "run_name no slash"),
    ("run_name = ''", "run_name ''"),
    ("run_name = None", "run_name None"),
    ("data_dir = ''", "data_dir not empty"),
    ("data_dir = 'a\\nb'", "data_dir printable 'a\\nb'"),
    ("n_head = 7", "d_model = 768 multiple"),
    ("inner = 0.5", "inner optimizer = mvr2"),
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


def test_wrong_name_of_a_file(config_file):
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


def test_building_checks_too():
    assert "steps" in refusal(lambda: Config(steps=0))
    assert "lr" in refusal(lambda: dataclasses.replace(Config(), lr=-1))


# Fuzz: nothing but UserError, whatever comes

TEXTS = st.text(max_size=30)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.sampled_from(sorted({c for opt in OPTIONS.values() for c in opt.metadata.get("choices", ())})),
)
NAMES = st.one_of(st.sampled_from(sorted(OPTIONS)), TEXTS)


def loads_or_refuses(action, *arguments) -> None:
    try:
        config = action(*arguments)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    except SystemExit as end:
        assert end.code == 0  # --help
    else:
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_fuzz_saved_config(values):
    loads_or_refuses(Config.from_dict, values)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["--" + name for name in OPTIONS] + ["--config", "--no-wandb", "--", "1", "-1", "auto"]),
            TEXTS,
            st.builds("--{}={}".format, NAMES, TEXTS),
            st.builds(str, st.one_of(st.integers(), st.floats())),
        ),
        max_size=6,
    )
)
def test_fuzz_command_line(words):
    loads_or_refuses(load_config, words)


@pytest.fixture(scope="module")
def fuzzed_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.py"


@settings(max_examples=150, deadline=None)
@given(
    source=st.one_of(
        st.builds("{}".format, TEXTS),
        st.lists(st.builds("{} = {!r}".format, NAMES, VALUES), max_size=4).map("\n".join),
        st.lists(st.builds("{} = {}".format, st.sampled_from(sorted(OPTIONS)), TEXTS), max_size=2).map("\n".join),
    )
)
def test_fuzz_file(fuzzed_file, source):
    fuzzed_file.write_text(source, encoding="utf-8", errors="surrogatepass")
    loads_or_refuses(load_config, ["--config", str(fuzzed_file)])


@settings(max_examples=50, deadline=None)
@given(source=st.binary(max_size=40))
def test_fuzz_bytes_of_a_file(fuzzed_file, source):
    fuzzed_file.write_bytes(source)
    loads_or_refuses(load_config, ["--config", str(fuzzed_file)])
