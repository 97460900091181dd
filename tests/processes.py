"""Processes that are forked from a server which has imported everything: a start costs what a fork costs."""

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / name) for name in (".", "kernels", "training", "tests")]
IMPORTED = ["fox_training.train", "fox_training.card", "fox_training.sharded", "datasets", "torch.distributed.fsdp"]


def server():
    """The start method; one server for all tests of a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    held = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    # The server looks at nothing else when it starts.
    os.environ |= {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in held.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def run_two(function, *arguments, timeout=400):
    """Call a function of a module on two processes, with the environment that torchrun gives them.

    Returns:
        What each has printed.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(2)]
        processes = [
            server().Process(target=_one_of_two, args=(rank, port, str(outputs[rank]), function, arguments))
            for rank in range(2)
        ]
        free.close()
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        said = [path.read_text(encoding="utf-8") for path in outputs]
    assert codes == [0, 0], "\n".join(text[-3000:] for text in said)
    return said


def _one_of_two(rank, port, output, function, arguments):
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    function(*arguments)
    sys.stdout.flush()
