"""One training step, float autograd against straight-through at every width. Writes results/train-step.json.

python benchmarks/bench_train_step.py [--seconds 60] [--device cuda] [--dtype bfloat16] [--out FILE]
"""

import argparse
from pathlib import Path

from rich.console import Console

from dqkernels.bench import train_step

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device")
    parser.add_argument("--dtype", nargs="*")
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 4, 2])
    parser.add_argument("--fixed", action="store_true", help="the fixed rules, not learned steps")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "train-step.json"))
    given = parser.parse_args()
    result = train_step.run(
        given.device, given.bits, given.dtype, not given.fixed, seconds=given.seconds, out=given.out
    )
    Console().print(train_step.render(result))
    for line in train_step.verdicts(result):
        print(line)
    if result["environment"]["gpu"] is None:
        print("GPU: not run")
