"""Which optimizers of other people's packages train, resume and run on two ranks: the table of docs/compare.md.

    pip install --no-deps -r requirements-studies.txt
    python -m experiments.third_party                      every class; writes the table
    python -m experiments.third_party --only lion          those whose name contains this; leaves the page

Each class trains a tiny model for 6 steps, in a process of its own. A second run goes on from the checkpoint of step 3 and must
end with the same bytes. Two ranks must end with the loss of one. What runs/third_party.jsonl records is not repeated.
"""

import importlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from common.errors import Parser, UserError, one_line_errors, positive, say
from common.files import write_text
from common.tables import markdown
from data import sotu

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compare.md"
RECORDS = Path("runs") / "third_party.jsonl"
BEGIN, END = "<!-- third_party: begin -->\n", "<!-- third_party: end -->\n"
# Modules and the classes to try there; None: all that the module gives.
MODULES: dict[str, str | None] = {
    "torch.optim": "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam",
    "examples.sam": "SAM",
    "adabelief_pytorch": None, "adabound": None, "adam_atan2_pytorch": None, "adam_mini": None, "adamp": None,
    "adamw_bf16": None, "adan_pytorch": None, "apollo_torch": "APOLLOAdamW GaLoreAdamW",
    "bitsandbytes.optim": "AdamW AdamW8bit AdEMAMix8bit LAMB8bit LARS8bit Lion8bit PagedAdamW8bit RMSprop8bit SGD8bit",
    "came_pytorch": None, "casmo": None, "dadaptation": None, "dog": None, "dowg": None, "galore_torch": None,
    "grams": None, "grokadamw": None, "heavyball": "AdamW Muon PSGDKron SFAdamW SOAP", "ivon": None, "kron_torch": "Kron",
    "lion_pytorch": None, "lomo_optim": None, "madgrad": None, "muon": None, "muon_fsdp2": None, "nadir": "Adam Lion SGD",
    "open_lars": None, "optimi": None, "optimuon": None, "parameterfree": None, "prodigyopt": None,
    "prodigyplus": "ProdigyPlusScheduleFree", "pytorch_optimizer": None, "ranger21": None, "schedulefree": None,
    "torch_optimizer": None, "torchao.optim": "AdamW4bit AdamW8bit AdamWFp8 CPUOffloadOptimizer",
    "transformers.optimization": "Adafactor",
}  # fmt: skip
# What a class needs besides lr: the options that the trainer's own message asks for.
_MUON_GROUPS = [["blocks.*", {"use_muon": True}], ["*", {"use_muon": False}]]
_AUX_GROUPS = [["blocks.*", {"use_muon": True, "lr": 0.02}], ["*", {"use_muon": False, "lr": 1e-3}]]
NEEDED: dict[str, dict[str, Any]] = {
    "heavyball:PSGDKron": {"optimizer_options": {"precond_init_scale": 0.1}},  # some first gradients of the model are 0
    "muon:MuonWithAuxAdam": {"param_groups": _AUX_GROUPS},
    "muon:SingleDeviceMuonWithAuxAdam": {"param_groups": _AUX_GROUPS},
    "pytorch_optimizer:BSAM": {"optimizer_options": {"num_data": 1000}},
}
# Compiling these takes minutes on a CPU. They are tried as they are without torch.compile.
_UNCOMPILED = ("heavyball:PSGDKron", "heavyball:SOAP", "kron_torch:Kron", "pytorch_optimizer:Kron")
_TINY: dict[str, Any] = {
    "text": "sotu", "vocab_size": 257, "n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32, "batch_size": 8,
    "micro_batch_size": 4, "device": "cpu", "dtype": "float32", "lr": 1e-3, "steps": 6, "val_every": 3, "val_tokens": 1024,
    "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9, "rank_timeout": 200,
}  # fmt: skip


def classes() -> Iterator[tuple[str, str]]:
    """Each class as module:Class, and its package with its version. Raises UserError for a package that is missing."""
    from torch.optim import Optimizer

    distributions = packages_distributions()
    for module, names in MODULES.items():
        top = module.partition(".")[0]
        try:
            found = vars(importlib.import_module(module))
        except Exception as error:
            raise UserError(f"{module} can't be imported ({error}); pip install -r requirements-studies.txt") from None
        package = "examples" if top == "examples" else f"{distributions[top][0]} {version(distributions[top][0])}"
        for name in names.split() if names else sorted(found):
            kind = found.get(name)
            if isinstance(kind, type) and issubclass(kind, Optimizer) and (names or kind.__module__.split(".")[0] == top):
                yield f"{module}:{name}", package


def row(spec: str, folder: Path, seconds: float) -> dict[str, str]:
    """What a class does: whether it trains, resumes, and runs on two ranks, each "yes" or "no", and a note."""
    options = (
        _TINY | NEEDED.get(spec, {}) | {"optimizer": spec, "results_dir": str(folder), "data_dir": str(folder.parent / "data")}
    )
    done, note, ranks = _run(options | {"run_name": "whole"}, seconds), "", 1
    if "--param-groups" in done.get("refused", "") and "use_muon" in done["refused"]:
        options["param_groups"] = _MUON_GROUPS
        done = _run(options | {"run_name": "whole"}, seconds)
    if "torchrun" in done.get("refused", ""):
        ranks = 2
        done = _run(options | {"run_name": "whole"}, seconds, ranks)
    if "--checkpoint-every 0" in done.get("refused", ""):
        note = _why(done, spec).partition("; --checkpoint-every 0")[0]
        options["checkpoint_every"] = 0
        done = _run(options | {"run_name": "without"}, seconds, ranks)
    if "loss" not in done:
        return {"trains": "refused" if "refused" in done else "no", "resumes": "", "ranks": "", "note": _why(done, spec)}
    result = {"trains": "yes", "resumes": "refused" if note else "no", "ranks": "no", "note": note}
    if not note:
        resumed = _run(
            options | {"run_name": "resumed", "resume": str(folder / "whole/checkpoints/step_0000003")}, seconds, ranks
        )
        same = "loss" in resumed and resumed["weights"] == done["weights"]
        result |= {"resumes": "yes"} if same else {"note": _why(resumed, spec) or "the resumed run ends with other weights"}
    if ranks == 2:
        return result | {"ranks": "yes, alone it is refused"}
    two = _run(options | {"run_name": "two"}, seconds, ranks=2)
    if "loss" not in two:
        return result | {
            "ranks": "refused" if "refused" in two else "no",
            "note": "; ".join(filter(None, [result["note"], _why(two, spec)])),
        }
    apart = abs(two["loss"] - done["loss"])
    return result | {"ranks": "yes" if apart < 2e-3 else f"loss {apart:.1g} apart"}


def _why(done: dict[str, Any], spec: str) -> str:
    return (done.get("refused") or done.get("failed") or "").removeprefix(f"optimizer = {spec}: ")


def _run(options: dict[str, Any], seconds: float, ranks: int = 1) -> dict[str, Any]:
    """Train in processes of their own. Returns the last loss and a hash of the weights, or why there is none."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        places = [
            {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            for i in range(ranks)
        ]  # fmt: skip
        processes = [context.Process(target=_train, args=(options, place, answer)) for place in places]
        deadline = time.monotonic() + seconds
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        return json.loads(answer.read_text()) if answer.exists() else {"failed": f"no end within {seconds} s, or a crash"}


def _train(options: dict[str, Any], place: dict[str, str], answer: Path) -> None:
    """In a process: train, and write what came out."""
    import hashlib

    os.environ.update(place, OMP_NUM_THREADS="1")
    import torch
    import torch._dynamo

    torch._dynamo.config.disable = options["optimizer"] in _UNCOMPILED
    if options["optimizer"].startswith("heavyball") and torch._dynamo.config.disable:  # it insists on what it compiles
        importlib.import_module("heavyball.utils").compile_mode = None

    torch.set_num_threads(1)
    import train_gpt
    from reading.runs import read_metrics
    from training.config import Config

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            folder = train_gpt.train(Config(**options))
            loss = [line["val_loss"] for line in read_metrics(folder / "metrics.jsonl") if "val_loss" in line][-1]
            weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            found: dict[str, Any] = {"loss": loss, "weights": weights}
        except UserError as error:
            early = not (Path(options["results_dir"]) / options["run_name"]).exists()
            found = {"refused" if early else "failed": " ".join(str(error).split())}
        except Exception as error:
            found = {"failed": traceback.format_exception_only(error)[-1].strip()[:200]}
    if place.get("RANK", "0") == "0":
        write_text(answer, json.dumps(found))
    if place:
        os._exit(0)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m experiments.third_party", description="Try optimizers of other packages.")
    parser.add_argument("--only", default="", metavar="WORD", help="classes whose name contains this; the page stays as it is")
    parser.add_argument("--jobs", type=positive, default=1, help="classes at a time [1]")
    parser.add_argument("--seconds", type=positive, default=240, help="most seconds for a run [240]")
    options = parser.parse_args(argv)
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    lines = map(json.loads, RECORDS.read_text().splitlines() if RECORDS.exists() else ())
    done = {(line["class"], line["package"]): line for line in lines}
    wanted = [wish for wish in classes() if options.only.lower() in wish[0].lower()]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train_gpt", "torch._dynamo", "pytorch_optimizer"])
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        sotu.prepare(Path(scratch) / "data")

        def tried(wish: tuple[str, str]) -> None:
            if wish not in done:
                found = row(wish[0], Path(scratch) / wish[0].replace(":", "."), options.seconds)
                done[wish] = {"class": wish[0], "package": wish[1], **found}
                with RECORDS.open("a") as file:
                    file.write(json.dumps(done[wish]) + "\n")
            say(json.dumps(done[wish]))

        list(pool.map(tried, wanted))
    if not options.only:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        write_text(PAGE, before + BEGIN + table([done[wish] for wish in wanted]) + END + rest.partition(END)[2])


def table(rows: list[dict[str, str]]) -> str:
    """How many do what, and the table of all."""
    works = sum(line["trains"] == "yes" and line["resumes"] in ("yes", "refused") for line in rows)
    refused = sum(line["trains"] == "refused" for line in rows)
    count = f"{len(rows)} classes: {works} train and resume, or are refused checkpoints; {refused} are refused;"
    cells = [["package", "class", "trains", "resumes", "two ranks", "why not"]]
    for line in rows:
        needed = [f"with {name}" for name in NEEDED.get(line["class"], {})]
        needed += ["without torch.compile"] * (line["class"] in _UNCOMPILED)
        note = line["note"].replace("|", "\\|") or ", ".join(needed)
        cells.append([line["package"], line["class"].partition(":")[2], line["trains"], line["resumes"], line["ranks"], note])
    return f"{count}\n{len(rows) - works - refused} fail.\n\n{markdown(cells)}"


if __name__ == "__main__":
    with one_line_errors("third_party"):
        main()
