"""Whole models generating: ours, Hugging Face's loop, and the peers that are installed. Writes results/generate.json
and .png (of the other sweeps generate-layers, generate-memory) after every cell; a run that was stopped goes on there.

python benchmarks/bench_generate.py [MODEL] [--sweep headline|layers|memory] [--seconds 900] [--bits 4] [--overwrite]
                                    [--batch_size 1,16] [--num_beams 1,4] [--out FILE] [--plot FILE]

Takes what `dqkernels bench generate` takes.
"""

import argparse
import sys
from pathlib import Path

from dqkernels.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sweep", default="headline")
    sweep = parser.parse_known_args(given)[0].sweep
    path = Path(__file__).parent / "results" / ("generate" if sweep == "headline" else f"generate-{sweep}")
    files = ["--out", f"{path}.json", "--plot", f"{path}.png"]
    mode = [] if "--overwrite" in given else ["--resume"]
    named = {flag.partition("=")[0] for flag in given}
    if mode and not named & {"--out", "--plot", "--table"}:
        mode.append("--overwrite")  # of the picture; a file that was named is not replaced unasked
    sys.exit(main(["bench", "generate", "--seconds", "900", *files, *mode, *given]))
