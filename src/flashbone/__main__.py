"""`python -m flashbone` is the `flashbone` command, also under `accelerate launch -m flashbone`."""

import sys

from flashbone.cli import main

if __name__ == "__main__":
    sys.exit(main())
