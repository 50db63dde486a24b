"""One training step, float autograd against straight-through at every width. Writes results/train-step.json.

python benchmarks/bench_train_step.py [--seconds 60] [--device cuda] [--dtype bfloat16] [--bits 8,4] [--fixed]
                                      [--out FILE]

Takes what `dqkernels bench train` takes.
"""

import sys
from pathlib import Path

from dqkernels.cli import main

if __name__ == "__main__":
    out = Path(__file__).parent / "results" / "train-step.json"
    sys.exit(main(["bench", "train", "--out", str(out), "--overwrite", *sys.argv[1:]]))
