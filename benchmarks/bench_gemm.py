"""The GEMM of a decoding step against cuBLAS and the int8 peers that are installed. Writes results/gemm.json.

python benchmarks/bench_gemm.py [--seconds 240] [--shapes 8192x8192,4096x1024] [--tokens 1,16] [--bits 4,2]
                                [--device cuda] [--out FILE]

Takes what `dqkernels bench gemm` takes.
"""

import sys
from pathlib import Path

from dqkernels.cli import main

if __name__ == "__main__":
    out = Path(__file__).parent / "results" / "gemm.json"
    sys.exit(main(["bench", "gemm", "--seconds", "240", "--out", str(out), "--overwrite", *sys.argv[1:]]))
