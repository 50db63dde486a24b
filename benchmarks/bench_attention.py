"""Int8 attention against torch's scaled_dot_product_attention over 64 to 4,096 keys: time and error to float64.

Writes results/attention.json and prints the table of docs/measured.md. Quiet the machine first and fix the threads:

OMP_NUM_THREADS=2 python benchmarks/bench_attention.py --backends cpu --out benchmarks/results/attention-NAME.json
python benchmarks/bench_attention.py --table benchmarks/results/attention-NAME.json    the table of a record again
"""

import argparse
from pathlib import Path

from dqkernels.bench import attention, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(attention.LENGTHS), help="numbers of keys")
    parser.add_argument("--backends", nargs="*", help="default: every one that can")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "attention.json"))
    parser.add_argument("--table", metavar="FILE", help="print the table of this record; measure nothing")
    given = parser.parse_args()
    if given.table is not None:
        print(attention.markdown(record.read(given.table)))
        return
    made = attention.run(given.lengths, given.dtype, given.device, given.backends, given.seconds, out=given.out)
    print(attention.markdown(made))


if __name__ == "__main__":
    main()
