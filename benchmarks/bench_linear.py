"""One linear layer, every bit width and backend, against torch's own. Writes results/linear.json.

python benchmarks/bench_linear.py [--seconds 60] [--device cuda] [--out FILE]
"""

import argparse
from pathlib import Path

from rich.console import Console

from dqkernels.bench import linear

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device")
    parser.add_argument("--dtype", nargs="*")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "linear.json"))
    given = parser.parse_args()
    result = linear.run(dtype=given.dtype, device=given.device, seconds=given.seconds, out=given.out)
    Console().print(linear.render(result))
