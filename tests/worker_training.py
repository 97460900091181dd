"""Run by test_training_parallel.py on each of two processes: the runs that it names, one after the other."""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from fox_training.recipe import load_recipe
from fox_training.train import train

VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def main():
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        for name in [name for name in os.environ if name.startswith(VARIABLES)]:
            del os.environ[name]
        os.environ.update(run["environment"])
        train(load_recipe(run["recipe"], run["overrides"]))
        # As in a new process, but for the process group.
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        sys.stderr.write(f"done {run['overrides']}\n")


if __name__ == "__main__":
    main()
