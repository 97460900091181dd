"""Kill a tiny run by SIGKILL at random moments, fifty times, and compare it with one that was left alone.

    python tests/kill_fifty_times.py                       # about 10 minutes on two cores; not part of `make test`
    python tests/kill_fifty_times.py --kills 5 --steps 200
    python tests/kill_fifty_times.py --kills 10 --steps 150 --processes 2

With two processes they are FSDP2 over gloo, each with its part of the weights and of every checkpoint; one of them is
killed, and the other must find that out and end by itself. Most kills hit at a random moment of training, evaluation
or saving, one in five while the process is still starting. Exits with 1 if a restart does not go on, if a step is
missing, or if one bit of a loss or of a weight differs.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "training"))]
RECIPE = {
    "run": {"device": "cpu", "threads": 1},
    "model": {
        "config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "hidden_dropout": 0.1,
        }
    },
    "data": {"validation_ids": ["1797-Adams"], "sequence_length": 64, "batch_size": 4},
    "optimizer": {"learning_rate": 1e-3, "ema_decay": 0.9},
    "evaluation": {"every_steps": 50, "batch_size": 16},
    "checkpoint": {"export": "best"},
    "tracking": {"log_every_steps": 1},
}  # fmt: skip
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def parser():
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    out.add_argument("--steps", type=int, default=1500, help="optimizer steps of the run; default: %(default)s")
    out.add_argument("--every", type=int, default=3, help="steps between checkpoints; default: %(default)s")
    out.add_argument("--processes", type=int, choices=[1, 2], default=1, help="default: %(default)s")
    out.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    return out


def write_recipe(folder, name, args):
    tree = json.loads(json.dumps(RECIPE))
    tree["run"]["output_dir"] = str(folder / name)
    tree["data"]["cache_dir"] = str(folder / "cache")
    tree["schedule"] = {"steps": args.steps, "warmup_steps": 10}
    tree["checkpoint"]["every_steps"] = args.every
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def train(recipe, rank, port):
    """In a child: its own words would fill the terminal."""
    if rank is not None:
        os.environ |= FSDP | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    from fox_training.train import main

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(main(["--recipe", str(recipe)]))


def start(context, recipe, number):
    """The processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [None] if number == 1 else range(number)
    processes = [context.Process(target=train, args=(recipe, rank, port)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def num_lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def live(context, recipe, out, number, moment):
    """Start the run and kill one of its processes at a random moment; returns False if it ended by itself."""
    processes = start(context, recipe, number)
    victim = moment.choice(processes)
    if moment.random() < 0.2:
        victim.join(moment.uniform(0, 2))
    else:
        before = num_lines(out / "metrics.jsonl")
        while all(process.is_alive() for process in processes) and num_lines(out / "metrics.jsonl") <= before:
            time.sleep(0.002)
        victim.join(moment.uniform(0, 0.5))
    alive = victim.is_alive()
    if alive:
        os.kill(victim.pid, signal.SIGKILL)
    for process in processes:
        # What waits for a process that never came, waits long: as a launcher does, end it.
        process.join(20)
        process.kill()
        process.join()
    if not alive and any(process.exitcode != 0 for process in processes):
        sys.exit(f"a restart ended with status {[process.exitcode for process in processes]} instead of going on.")
    return alive


def curve(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        (line["step"], key): float(line[key]).hex()
        for line in lines
        for key in ("loss", "grad_norm", "eval_loss")
        if key in line
    }


def main():
    args = parser().parse_args()
    sys.path[:0] = PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    # Everything is imported once; a start costs what a fork costs.
    context.set_forkserver_preload(["fox_training.train", "fox_training.card", "datasets"])
    moment, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fox-kill-") as place:
        folder = Path(place)
        whole, killed = write_recipe(folder, "whole", args), write_recipe(folder, "killed", args)
        for process in start(context, whole, args.processes):
            process.join()
        kills = 0
        reached = folder / "killed" / "metrics.jsonl"
        while kills < args.kills:
            if not live(context, killed, folder / "killed", args.processes, moment):
                print(f"the run was complete after {kills} kills: raise --steps")
                break
            kills += 1
            print(f"kill {kills}: {num_lines(reached)} lines logged, {time.monotonic() - began:.0f} s", flush=True)
        last = start(context, killed, args.processes)
        for process in last:
            process.join()
        if any(process.exitcode for process in last):
            sys.exit(f"the last restart ended with status {[process.exitcode for process in last]}.")
        same_curve = curve(folder / "whole") == curve(folder / "killed")
        weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
        print(
            f"{kills} kills in {time.monotonic() - began:.0f} s; {args.steps} steps, a checkpoint every {args.every}; "
            f"losses, norms and evaluations {'identical' if same_curve else 'DIFFERENT'}, "
            f"weights {'identical' if weights[0] == weights[1] else 'DIFFERENT'}"
        )
        sys.exit(0 if same_curve and weights[0] == weights[1] and kills == args.kills else 1)


if __name__ == "__main__":
    main()
