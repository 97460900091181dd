"""`python -m fox_rl.experiments`: see `runner`, whose functions worker processes can import by name."""

import sys

from fox_rl.experiments.runner import main

if __name__ == "__main__":
    sys.exit(main())
