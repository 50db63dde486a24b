"""`python -m dqkernels` is the `dqkernels` command."""

import sys

from dqkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
