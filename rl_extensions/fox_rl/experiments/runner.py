"""Run the experiments that RESULTS.md reports, all at once on all cores, and go on where a run was cut off.

    python -m fox_rl.experiments memory pruning-cartpole --workers 8 --out runs/experiments
    python -m fox_rl.experiments early-stop-halfcheetah --seconds 470 --out runs/experiments      with a GPU
    python -m fox_rl.experiments memory pruning-cartpole --out runs/experiments --report          tables and figures

Writes every number the moment it is measured to OUT/results.csv (experiment, job, arm, seed, step, metric, value).
Jobs that are in there as done are not run again; what a job that was cut off had measured is replaced.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fox_rl.experiments.jobs import EXPERIMENTS, Job, train_atari, train_many, train_many_dqn
from fox_rl.experiments.report import write_report

COLUMNS = ("experiment", "job", "arm", "seed", "step", "metric", "value")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of results.csv; a last line without its end is left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def drop_unfinished(path: Path) -> set[tuple[str, str]]:
    """Keep the rows of finished jobs only; returns those jobs as (experiment, job)."""
    rows = read_rows(path)
    done = {(row["experiment"], row["job"]) for row in rows if row["metric"] == "done"}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if (row["experiment"], row["job"]) in done)
    return done


def work(job: Job, queue: Any) -> None:
    """Body of a worker process: sends rows, then `(job, None)`."""
    key = (job.experiment, job.name)

    def report(arm: str, seed: int, step: int, metric: str, value: float) -> None:
        queue.put((key, (*key, arm, seed, step, metric, repr(float(value)))))

    begin = time.perf_counter()
    try:
        job.run(report, **job.settings)
        queue.put((key, (*key, "", "", "", "done", repr(time.perf_counter() - begin))))
    except Exception:
        sys.stderr.write(f"{job.experiment} {job.name} failed:\n{traceback.format_exc()}")
    queue.put((key, None))


@contextmanager
def ended_at_last(running: dict[tuple[str, str], Any]) -> Iterator[None]:
    """Terminate the processes that are left, however the block is left."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(5.0)


def run_all(jobs: list[Job], workers: int, path: Path, seconds: float | None) -> int:
    """Run jobs in processes of their own, the longest first, equal ones as planned; returns how many were finished."""
    context = multiprocessing.get_context("spawn")
    queue, waiting = context.Queue(), sorted(jobs, key=lambda job: -job.cost)
    running: dict[tuple[str, str], Any] = {}
    deadline = None if seconds is None else time.monotonic() + seconds
    finished = 0
    with path.open("a", encoding="utf-8", newline="") as file, ended_at_last(running):
        writer = csv.writer(file)
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                # No daemon: a job may have processes of its own.
                process = context.Process(target=work, args=(job, queue))
                process.start()
                running[(job.experiment, job.name)] = process
            if deadline is not None and time.monotonic() > deadline:
                sys.stderr.write(f"time is up: {len(running)} jobs were cut off, {len(waiting)} not begun.\n")
                break
            try:
                key, row = queue.get(timeout=1.0)
            except Exception:  # queue.Empty of any context
                for key in [key for key, process in running.items() if process.exitcode not in (None, 0)]:
                    sys.stderr.write(f"{' '.join(key)} died with exit code {running.pop(key).exitcode}.\n")
                continue
            if row is None:
                running.pop(key).join()
            else:
                writer.writerow(row)
                file.flush()
                if row[2] == "all":  # of the process, not of an arm
                    sys.stdout.write(f"{' '.join(key)}: step {row[4]}, {row[5]} {float(row[6]):.4g}\n")
                    sys.stdout.flush()
                if row[5] == "done":
                    finished += 1
                    sys.stdout.write(f"{' '.join(key)}: {float(row[6]):.0f} s; {len(waiting)} waiting\n")
                    sys.stdout.flush()
    return finished


def build_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    listing = "\n".join(f"    {name:24}{experiment.text}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fox_rl.experiments", description=f"{__doc__}\nExperiments:\n{listing}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="experiments, see above")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), help="folder (default: runs/experiments)"
    )
    parser.add_argument("--seeds", type=int, default=None, help="runs of each arm (default: of each experiment)")
    parser.add_argument("--first-seed", type=int, default=0, help="the runs of an arm have the seeds from here on")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=None, help="pruning-*: only these learning rates (default: all)"
    )
    parser.add_argument("--steps", type=int, default=None, help="environment steps of a run (default: of each)")
    parser.add_argument("--seconds", type=float, default=None, help="stop everything after this time (default: never)")
    parser.add_argument(
        "--eager", action="store_true", help="early-stop-*, pruning-cartpole and -lunarlander: no CUDA graphs"
    )
    parser.add_argument(
        "--env-workers", type=int, default=None,
        help="the same: processes of a job that step its environments (default: all cores but a few); pruning-atari: "
        "threads",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only write tables and figures from results.csv")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    options = build_parser().parse_args(argv)
    if options.workers < 1 or (options.seeds is not None and options.seeds < 1):
        build_parser().error(f"--workers and --seeds must be at least 1; got {options.workers} and {options.seeds}")
    if options.first_seed < 0 or (options.first_seed and "throughput" in options.names):
        build_parser().error(
            f"--first-seed must be at least 0, and 0 for throughput, whose runs are rounds; got {options.first_seed}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.csv"
    missing = 0
    if not options.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # for PyTorch in the processes
        done = drop_unfinished(path)
        jobs = [job for job in planned(options) if (job.experiment, job.name) not in done]
        missing = len(jobs) - run_all(jobs, options.workers, path, options.seconds)
    sys.stdout.write(write_report(read_rows(path), options.names, options.out) + "\n")
    return 1 if missing else 0


def planned(options: argparse.Namespace) -> list[Job]:
    """The jobs that the command line asks for."""
    jobs = []
    for name in options.names:
        experiment = EXPERIMENTS[name]
        seeds = range(options.first_seed, options.first_seed + (options.seeds or experiment.seeds))
        jobs += experiment.jobs(seeds, options.steps)
    if options.rates is not None:
        for rate in sorted(set(options.rates) - {job.rate for job in jobs}):
            build_parser().error(f"--rates must be rates of these experiments; got {rate:g}")
        jobs = [job for job in jobs if job.rate in options.rates]
    for job in jobs:
        if job.run in (train_many, train_many_dqn):
            job.settings.update({"graphs": False} if options.eager else {})
            job.settings.update({"workers": options.env_workers} if options.env_workers else {})
        elif job.run is train_atari:
            job.settings.update({"env_threads": options.env_workers} if options.env_workers else {})
    return jobs
