"""Every op but the linear, at BART's shapes, against torch's own and a copy. Writes results/kernels.json.

python benchmarks/bench_kernels.py [--ops qattention gelu_quantize] [--seconds 60] [--device cuda] [--out FILE]
"""

import argparse
from pathlib import Path

from rich.console import Console

from dqkernels.bench import kernels

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", choices=list(kernels.OPS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device")
    parser.add_argument("--dtype", nargs="*")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "kernels.json"))
    given = parser.parse_args()
    result = kernels.run(ops=given.ops, dtype=given.dtype, device=given.device, seconds=given.seconds, out=given.out)
    Console().print(kernels.render(result))
