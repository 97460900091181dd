"""What the benchmarks share: the workload, arguments, the tests that run first, and rows of a CSV."""

import argparse
import csv
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "benchmarks"
sys.path.insert(0, str(ROOT / "kernels"))

LOG_TOLERANCE = -10.0

# Dense bfloat16 TFLOP/s of the tensor cores, from NVIDIA's data sheets; by a part of the device's name.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0, "L40S": 362.0}


def device():
    """A GPU if there is one; the CPU only for trying out the code."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def log_gates(batch, heads, length, generator):
    """Head h of H forgets 10 ** (-4 h / (H - 1)) nats a token on average; `(B, H, T)` float32."""
    where = generator.device
    decay = 10.0 ** (-4.0 * torch.arange(heads, device=where) / max(heads - 1, 1))
    return -decay[:, None] * torch.empty(batch, heads, length, device=where).exponential_(generator=generator)


def rms_normalised(x, weight=1.0):
    """As QK-norm leaves queries and keys."""
    return (weight * x.float() / x.float().square().mean(-1, keepdim=True).sqrt()).to(x.dtype)


def logit_bound(head_dim):
    """Of RMS-normalised queries and keys: sqrt(D), and 1 % for their rounding to bfloat16."""
    return 1.01 * head_dim**0.5


class Trained(NamedTuple):
    """Gates and QK-norms of a trained model, as training/experiments/compare_on_real_text.py leaves them.

    Attributes:
        log_fgate: `(B, H, T)` float32, nats.
        q_norm, k_norm: `(H, 1, D)`, weights of the norms; 1 where the model's heads have another width.
        bound: `(B, H)`: no logit of these queries and keys is larger.
    """

    log_fgate: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    bound: torch.Tensor


def trained(path, batch, heads, length, head_dim, where):
    """`heads` of the model's heads, evenly from all its layers. What the file has too little of is repeated.

    Sequences after the first begin elsewhere in the text, text that is too short begins again, and so do the heads.
    """
    from safetensors.torch import load_file

    file = load_file(path)
    every = file["log_fgate" if file["log_fgate"].shape[-1] >= length else "log_fgate_long"]
    every = every[:, 0].flatten(0, 1).float()  # (layers * H, T)
    picked = torch.linspace(0, len(every) - 1, heads).round().long() if heads <= len(every) else torch.arange(heads)
    picked %= len(every)
    at = torch.arange(length) + torch.arange(batch)[:, None] * (every.shape[-1] // batch)
    gates = every[picked][:, at % every.shape[-1]].transpose(0, 1)
    norms = [file[name].flatten(0, 1)[picked, None] for name in ("q_norm", "k_norm")]
    if norms[0].shape[-1] != head_dim:
        norms = [torch.ones(heads, 1, head_dim)] * 2
    bound = logit_bound(head_dim) * (norms[0] * norms[1]).abs().amax((1, 2))
    return Trained(*(x.to(where).contiguous() for x in (gates, *norms, bound.expand(batch, heads))))


def parser(doc, *, shapes, letters, results):
    """The arguments that every benchmark has; `results` is the default CSV, None if nothing is written."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--shapes", nargs="+", default=shapes, metavar=letters, help="default: %(default)s")
    out.add_argument("--csv", default=FOLDER / results, type=Path, help="rows are appended; default: %(default)s")
    out.add_argument("--skip-tests", action="store_true", help="time without testing first; the rows say so")
    if results is not None:
        out.add_argument(
            "--gates", type=Path, metavar="FILE", help="gates and norms of a trained model as the workload"
        )
    out.add_argument("--commit", help="what to write where the folder is no git checkout (default: asks git)")
    return out


def parsed_shapes(texts, letters):
    try:
        shapes = [tuple(int(x) for x in text.split(",")) for text in texts]
    except ValueError:
        shapes = []
    count = letters.count(",") + 1
    if not shapes or any(len(shape) != count or min(shape) < 1 for shape in shapes):
        sys.exit(f"--shapes must be {letters}, {count} whole numbers each; got {texts}.")
    return shapes


def require_gpu():
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name} needs a CUDA device; none is visible.")


def run_tests(*files):
    """A wrong kernel gets no time."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", *files]
    if subprocess.run(tests, cwd=ROOT, env=os.environ | {"FOX_TEST_THREADS": "8"}).returncode:
        sys.exit("The operator's tests failed: no times are taken of a wrong kernel.")


def commit():
    """The commit of the working tree, `+changes` if it differs from it; "unknown" outside of a checkout."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(options):
    """The last columns of every row."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__, "triton": triton.__version__, "commit": options.commit or commit(),
        "tested": not options.skip_tests, "date": datetime.date.today().isoformat(),
        "note": f"gates of {options.gates.name}" if getattr(options, "gates", None) else "",
    }  # fmt: skip


ENVIRONMENT = ["gpu", "torch", "triton", "commit", "tested", "date", "note"]


def append_rows(path, columns, rows):
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != columns:
            sys.exit(f"{path} has other columns: {header}. Give another file by --csv.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows appended to {path}")


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def peak_tflops(given):
    """`given`, or the data sheet's for this device, or None."""
    if given is not None or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
