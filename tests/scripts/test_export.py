"""The folder for Hugging Face: logits, cache, padding, tokenizers, the evaluation harness, and the hub."""

import json
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data.tokenize_text import load_encoder
from scripts.export import byte_characters, main
from tests.helpers import forked
from tests.helpers.hub_server import UploadServer
from tests.helpers.trained import random_model, write_run

# Nothing here imports the hub's library while tests are collected, because other tests set variables that its import reads.
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The people, 1790.", "  Größe\n\n\tof 漢字 and 🙂's  ", "don't 12345 x=y+1;", ""]


@pytest.fixture(scope="module", autouse=True)
def no_internet(tmp_path_factory):
    """No network. transformers copies a folder's code into a cache before importing it; this gives it a cache of its own."""
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(home))
        yield


@pytest.fixture(scope="module", params=["bytes", "gpt2"])
def exported(request, tmp_path_factory):
    """The encoding, the run's own model, and the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = {"bytes": 257, "gpt2": 50304}[request.param]
    run = write_run(folder / "run", vocab_size=vocabulary, val_loss=1.25)
    main([str(run), "--out", str(folder / "out")])
    return request.param, random_model(vocab_size=vocabulary), folder / "out"


def load(folder):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(exported):
    return load(exported[2])


def near(logits, expected):
    assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-5


@torch.no_grad()
def test_logits_and_loss_agree_with_ours(exported, loaded):
    _, ours, _ = exported
    theirs, _ = loaded
    tokens = torch.randint(0, 257, (3, 32), generator=torch.Generator().manual_seed(1))
    expected = ours(tokens)
    answer = theirs(tokens, labels=tokens)
    assert answer.logits.dtype == torch.float32
    assert expected.abs().max() > 1
    near(answer.logits, expected)
    assert answer.loss.item() == pytest.approx(ours(tokens[:, :-1], tokens[:, 1:]).item(), abs=1e-5)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@torch.no_grad()
def test_the_cache_and_padding_change_nothing(exported, loaded):
    _, ours, _ = exported
    theirs, _ = loaded
    tokens = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(2))
    expected = ours(tokens)
    first = theirs(tokens[:, :7])
    rest = theirs(tokens[:, 7:15], past_key_values=first.past_key_values)
    last = theirs(tokens[:, 15:], past_key_values=rest.past_key_values, logits_to_keep=1)
    near(torch.cat([first.logits, rest.logits], 1), expected[:, :15])
    near(last.logits, expected[:, -1:])
    for left in (True, False):
        padding, mask = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 26, dtype=torch.long)
        where = slice(0, 6) if left else slice(20, 26)
        mask[:, where] = 0
        padded = torch.cat([padding, tokens] if left else [tokens, padding], 1)
        logits = theirs(padded, attention_mask=mask).logits
        assert logits.isfinite().all()
        near(logits[:, 6:] if left else logits[:, :20], expected)


@torch.no_grad()
def test_generation_agrees_with_ours(exported, loaded):
    """Greedy, one prompt alone and two of different lengths in one batch, with the cache and without."""
    encoding, ours, _ = exported
    theirs, tokenizer = loaded
    end, wanted = (256, 257) if encoding == "bytes" else (50256, 50257), []
    prompts = ["The", "A few"]
    for prompt in prompts:
        tokens = tokenizer(prompt)["input_ids"]
        for _ in range(12):
            logits = ours(torch.tensor([tokens]))[0, -1]
            tokens.append(int(logits[: end[1]].argmax()))
        wanted.append(tokens[-12:])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for prompt, expected in zip(prompts, wanted, strict=True):
        for use_cache in (True, False):
            out = theirs.generate(**tokenizer(prompt, return_tensors="pt"), use_cache=use_cache, **options)
            assert out[0, -12:].tolist() == expected
    batch = theirs.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **options)
    assert [row[-12:].tolist() for row in batch] == wanted
    assert len(set(wanted[0] + wanted[1])) > 4


def test_the_tokenizer_agrees_with_the_datas(exported, loaded):
    encoding, _, _ = exported
    _, tokenizer = loaded
    ours = load_encoder(encoding)
    for text, tokens in zip(TEXTS, ours.encode(TEXTS), strict=True):
        ids = tokenizer(text)["input_ids"]
        assert ids == [ours.end_of_text, *map(int, tokens)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.end_of_text and len(tokenizer) == ours.vocab_size


def test_the_characters_of_bytes_are_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert dict(enumerate(byte_characters())) == bytes_to_unicode()


def test_saved_again_and_in_bfloat16(exported, loaded, tmp_path):
    import transformers

    theirs, _ = loaded
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype=torch.bfloat16)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        exact, rounded = theirs(tokens).logits, again(tokens).logits
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_trains(loaded):
    theirs, _ = loaded
    tokens = torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(3))
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in theirs.parameters())
    theirs.zero_grad()


def test_the_card(exported):
    _, _, folder = exported
    card = (folder / "README.md").read_text()
    assert "validation loss of 1.2500" in card and '"lr"' in card and card.startswith("---\nlibrary_name: transformers")


@pytest.mark.slow
def test_the_evaluation_harness(exported, tmp_path, monkeypatch):
    """lm-evaluation-harness on a task of two lines gives our log-likelihoods."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    encoding, ours, folder = exported
    examples = [{"text": "The people of", "end": " these States"}, {"text": "No.", "end": " Yes, 12"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tmp_path / "two.yaml").write_text(
        f"task: two\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'two.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{end}}'\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True, "device": "cpu"},
        tasks=["two"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    encoder = load_encoder(encoding)
    for sample in results["samples"]["two"]:
        start, both = encoder.encode([sample["doc"]["text"], sample["doc"]["text"] + sample["doc"]["end"]])
        tokens = torch.tensor([[encoder.end_of_text, *map(int, both)]])
        with torch.no_grad():
            logs = torch.log_softmax(ours(tokens[:, :-1])[0], -1).gather(1, tokens[0, 1:, None])
        assert sample["resps"][0][0][0] == pytest.approx(logs[len(start) :].sum().item(), abs=1e-3)
    assert len(results["samples"]["two"]) == 2


# ---- errors


def test_a_taken_folder_stays(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file").write_text("")
    for out, said in [("out", "is taken; choose another --out"), ("file", "is taken"), ("file/x", "can't be written")]:
        with pytest.raises(UserError, match=said):
            main([str(run), "--out", str(tmp_path / out)])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "run"]


def test_an_empty_folder_will_do(tmp_path):
    (tmp_path / "out").mkdir()
    main([str(write_run(tmp_path / "run")), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").is_file()


def test_wrong_words(tmp_path):
    odd = write_run(tmp_path / "odd", vocab_size=61)
    for words, said in [
        ([str(odd)], "--out"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "out")], "there is no such run"),
        ([str(odd), "--out", str(tmp_path / "out")], "is neither GPT-2's nor bytes"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            main(words)
        assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


# ---- the hub


def push(tmp_path, endpoint, **environment):
    """Export a run and push it, as the command does."""
    run = write_run(tmp_path / "run")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ours"},
        **environment,
    }
    words = [sys.executable, "-m", "scripts.export", str(run), "--out", str(tmp_path / "out"), "--push-to-hub", "user/ours"]
    return forked.run(words, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_push(tmp_path):
    with UploadServer() as hub:
        ended = push(tmp_path, hub.url)
    assert (ended.returncode, ended.stdout.splitlines()) == (0, [str(tmp_path / "out"), f"{hub.url}/user/ours"]), ended.stderr
    assert hub.files["user/ours"] == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.tokens >= {"Bearer hf_ours"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no network", "refused", "no token"])
def test_a_push_that_fails(tmp_path, kind):
    with UploadServer(status=403) as hub:
        if kind == "no network":
            ended = push(tmp_path, "http://127.0.0.1:9")
        else:
            ended = push(tmp_path, hub.url, **({"HF_TOKEN": ""} if kind == "no token" else {}))
    said = {"no network": "the hub can't be reached", "refused": "the hub refused (403", "no token": "HF_TOKEN"}[kind]
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and said in ended.stderr, ended.stderr
    assert f"hf upload user/ours {tmp_path / 'out'}" in ended.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
