"""``python -m speculators_core``: the command line, for torchrun."""

from speculators_core.cli import main

if __name__ == "__main__":
    main()
