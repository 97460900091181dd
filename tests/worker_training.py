"""Called by test_training_parallel.py on each of two processes: the runs that it names, one after the other."""

import os
import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import distributed

from fox_training import train
from fox_training.recipe import load_recipe

VARIABLES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def copy_and_damage(source, folder, file):
    """A run as it was left, with one bit of a file turned over."""
    if distributed.get_rank() == 0:
        shutil.copytree(source, folder)
        path = Path(folder) / file
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    distributed.barrier()


def train_all(runs):
    train.write_card = lambda out: None
    for run in runs:
        for name in [name for name in os.environ if name.startswith(VARIABLES)]:
            del os.environ[name]
        os.environ.update(run["environment"])
        if "damaged" in run:
            copy_and_damage(*run["damaged"])
        train.train(load_recipe(run["recipe"], run["overrides"]))
        # As in a new process, but for the process group.
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        sys.stderr.write(f"done {run['overrides']}\n")
    distributed.destroy_process_group()
