"""What a measured figure must carry to be repeatable: command, commit, hardware, versions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "evaluate", "fox-transformers")


def describe(command: str) -> dict:
    """Everything below in one dictionary that JSON can hold.

    Args:
        command: The command line that produced the figures, see `command_line`.
    """
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def command_line(module: str, arguments: list[str]) -> str:
    """The command as a reader would type it, quoted for a POSIX shell; `module` may be the path of a script."""
    import shlex

    program = [module] if module.endswith(".py") else ["-m", module]
    return shlex.join(["python", *program, *arguments])


def commit() -> str | None:
    """Git commit of the code that runs, with "-dirty" if tracked files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        # The folder of an installed package may lie inside somebody else's checkout: ask for our own file first.
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict:
    """CPU model and cores this process may use, memory in GiB, names of the CUDA devices."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cpu_cores": cores, "memory_gib": _memory_gib(), "gpus": devices}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the figures; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # The distribution's metadata drops the build tag, which says CPU or CUDA.
    if "torch" in sys.modules:
        found["torch"] = str(sys.modules["torch"].__version__)
    return found


def weights_sha256(folder: str | Path) -> str | None:
    """SHA-256 over the safetensors files of a local folder, in order of their names; None if it has none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def one_line(hardware: dict) -> str:
    """The dictionary of `hardware()` as a phrase: GPUs if there are any, else the CPU."""
    if hardware["gpus"]:
        return f"{len(hardware['gpus'])} x {hardware['gpus'][0]}"
    return f"{hardware['cpu_cores']} cores of {hardware['cpu']}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
