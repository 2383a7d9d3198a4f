"""``python -m speculators_core``: the command line, for torchrun and for where no script is."""

from speculators_core.cli import main

if __name__ == "__main__":
    main()
