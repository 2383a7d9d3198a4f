"""``python -m benchmarks.acceptance``: the command `speculators acceptance`."""

import sys

from speculators_core.cli import main

if __name__ == "__main__":
    main(["acceptance", *sys.argv[1:]])
