"""Generation with a whole model, float against packed. Writes results/model.json.

python benchmarks/bench_model.py [bart-base | bart-large | mbart-large | tiny | FOLDER] [--num_beams 4]
"""

import argparse
from pathlib import Path

from rich.console import Console

from dqkernels.bench import model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset_or_path", nargs="?", default="bart-base")
    parser.add_argument("--device")
    for name, default in (("batch_size", 1), ("source_tokens", 128), ("new_tokens", 32), ("num_beams", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "model.json"))
    result = model.run(**vars(parser.parse_args()))
    Console().print(model.render(result))
