"""Random options, command lines and config files: they load, or raise a UserError of one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from training.config import OPTIONS, Config, load_config

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


@settings(max_examples=150, deadline=None)
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
