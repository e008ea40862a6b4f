"""Kill training runs with SIGKILL at random moments, resume them, and compare them with an undisturbed run.

    python tests/helpers/kill_test.py --kills 20 --variant mvr2 --ranks 2

Half of the kills come after a random time, the others at a random place in the code: a step, the gap between two passes, a
validation, a half-written line of metrics.jsonl, a checkpoint's files, its renaming, the removal of an old one. All ranks die
each time, and `--resume auto` continues. The weights of the finished run must equal the undisturbed run's bit for bit, and the
lines of metrics.jsonl too, except for the seconds. If kills are left, another run starts.
"""

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.train_runs import Trainer, write_data  # noqa: E402

VARIANTS = {
    "gluon": "--optimizer gluon --weight-decay 0.3",
    "mvr1": "--optimizer mvr1 --gamma 0.3",
    "mvr2": "--optimizer mvr2 --q 0.6",
    "mvr3": "--optimizer mvr3 --q 0.6 --gamma 0.4 --momentum 0.5",
    "single_batch": "--optimizer single_batch --gamma 0.3",
    "previous_batch": "--optimizer previous_batch --gamma 0.4",
    "adamw": "--optimizer adamw",
}
TWO_PASSES = ("mvr1", "mvr2", "mvr3", "previous_batch")
OPTIONS = "--steps 24 --val-every 5 --checkpoint-every 3 --val-tokens 2048"
# The places of kills: (module, attribute). The process dies when the call begins.
PLACES = {
    "between the passes": ("optim.mvr", "_TwoPasses._move_averages"),
    "in the fold": ("optim.base", "LayerwiseOptimizer._fold_gradients"),
    "in the update": ("optim.base", "LayerwiseOptimizer._apply_update"),
    "in the loss": ("model", "GPT.forward"),
    "in a validation": ("training.ranks", "Ranks.total"),
    "in a line of metrics.jsonl": ("os", "pwrite"),
    "before a file is on disk": ("os", "fsync"),
    "before a file gets its name": ("os", "replace"),
    "before a checkpoint gets its name": ("os", "rename"),
    "in the removal of a checkpoint": ("shutil", "rmtree"),
    "while the run is described": ("training.run_folder", "_describe"),
}


def die_in(place: str, call: int) -> None:
    """Make this process kill itself in call number `call` of a place."""
    module, _, path = PLACES[place][0], None, PLACES[place][1]
    owner: Any = __import__(module, fromlist=["_"])
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "pwrite":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def kill_runs(
    trainer: Trainer, variant: str, kills: int, ranks: int, seed: int, say: Callable[[str], None] = print
) -> tuple[int, int, Counter[str]]:
    """Kill and resume runs of a variant. Returns (kills survived, kills made, kills by place)."""
    options, random_ = f"{VARIANTS[variant]} {OPTIONS}", random.Random(f"{seed}-{variant}-{ranks}")
    started = time.monotonic()
    expected = trainer.run(f"{variant}-{ranks}-undisturbed", options, ranks=ranks).ok()
    duration = time.monotonic() - started
    places = [place for place in PLACES if variant in TWO_PASSES or "pass" not in place]
    survived, made, where, number = 0, 0, Counter(), 0
    while made < kills:
        number += 1
        name, in_this_run = f"{variant}-{ranks}-{number}", 0
        while True:
            patch, after = None, 0.0
            if made < kills:
                if random_.random() < 0.5:
                    after = random_.uniform(0.02, 0.9) * duration
                else:
                    place = random_.choice(places)
                    patch = functools.partial(die_in, place, int(random_.triangular(1, 7, 1)))
            running = trainer.start(name, f"{options} --resume auto", ranks=ranks, patch=patch)
            if after or patch:
                running.wait_for_death(after or 60)
                if running.kill():
                    made, in_this_run = made + 1, in_this_run + 1
                    where["at a random time" if after else place] += 1
                    continue
            done = running.done().ok()
            break
        try:
            done.same_as(expected)
            survived += in_this_run
            say(f"{name}: {in_this_run} kills, no difference")
        except AssertionError as error:
            say(f"{name}: {in_this_run} kills, but the run differs: {str(error)[:300]}")
    return survived, made, where


def main() -> None:
    """Kill, and print how many kills were survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills per variant and number of ranks")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated; default: all")
    parser.add_argument("--ranks", type=int, action="append", help="may be repeated; default: 1 and 2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    all_survived, all_made = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder) / "results", write_data(Path(folder) / "data"))
        for variant in options.variant or VARIANTS:
            for ranks in options.ranks or (1, 2):
                survived, made, where = kill_runs(trainer, variant, options.kills, ranks, options.seed)
                places = ", ".join(f"{count} {place}" for place, count in where.most_common())
                print(f"{variant}, {ranks} ranks: {survived} of {made} kills survived ({places})", flush=True)
                all_survived, all_made = all_survived + survived, all_made + made
    print(f"{all_survived} of {all_made} kills survived")
    sys.exit(all_survived != all_made)


if __name__ == "__main__":
    main()
