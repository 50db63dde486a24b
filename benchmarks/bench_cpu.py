"""What the goals of the CPU are about: GEMV, GEMM, decode steps, threads, memory, whole models. Writes results/cpu.json
after every part; a run that was stopped goes on there.

python benchmarks/bench_cpu.py [--seconds 900] [--parts gemv,step,threads,memory,gemm,generate] [--bits 8,4,2]
                               [--shape bart-base] [--overwrite] [--out FILE]

Takes what `dqkernels bench cpu` takes.
"""

import sys
from pathlib import Path

from dqkernels.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    out = Path(__file__).parent / "results" / "cpu.json"
    mode = [] if "--overwrite" in given else ["--resume"]
    sys.exit(main(["bench", "cpu", "--seconds", "900", "--out", str(out), *mode, *given]))
