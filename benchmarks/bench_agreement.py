"""Do fused blocks and int8 attention choose the words of the plain quantized model? Writes results/agreement.json.

Over the shipped teacher at 8, 4 and 2 bits and its 2-bit student, on held-out docstrings; docs/measured.md quotes it.

python benchmarks/bench_agreement.py [--pairs 128] [--out FILE]
"""

import argparse
from pathlib import Path

from dqkernels.bench import agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128, help="held-out docstrings (default 128)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "agreement.json"))
    given = parser.parse_args()
    agreement.run(given.pairs, out=given.out, tell=print)


if __name__ == "__main__":
    main()
