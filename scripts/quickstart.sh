#!/usr/bin/env bash
# Trains Gluon and Gluon-MVR-1, -2, -3 on the embedded text, draws their validation-loss curves, and prints text from the best one.
# Installs what it needs into .venv. Run it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt
runs="quickstart_gluon quickstart_mvr1 quickstart_mvr2 quickstart_mvr3"

train() { .venv/bin/python train_gpt.py --config "configs/$1.py" --resume auto | cat; }

# On a GPU, one run at a time; on a CPU two at a time, each on one core.
if .venv/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  for run in $runs; do train "$run"; done
else
  export OMP_NUM_THREADS=1
  # The expensive runs go first, so that the cheap one fills the remaining time.
  printf '%s\n' quickstart_mvr1 quickstart_mvr2 quickstart_mvr3 quickstart_gluon |
    xargs -P 2 -I{} bash -c 'set -o pipefail; .venv/bin/python train_gpt.py --config configs/{}.py --resume auto | cat'
fi
.venv/bin/python -m scripts.plot $(printf 'runs/%s ' $runs) --out runs/quickstart.png
echo
.venv/bin/python -m scripts.sample $(printf 'runs/%s ' $runs) --prompt "The people of the United States" --tokens 300
