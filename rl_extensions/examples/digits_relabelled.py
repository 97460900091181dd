"""Does a deep network still learn after its labels were exchanged? Multi-skip against a plain net, on a CPU.

    python rl_extensions/examples/digits_relabelled.py              5 seeds, a minute for each arm and seed on one core
    python rl_extensions/examples/digits_relabelled.py --quick      1 seed, 2 labellings
    python rl_extensions/examples/digits_relabelled.py --arms plain multi plain-kron --seeds 3

The setting of arXiv:2506.15544 (figure 1) in small: 512 images of scikit-learn's digits, whose labels are dealt out
anew at random after every 60 epochs, so that targets are as non-stationary as can be while the inputs stay. Plain:
22 linear layers. Multi: 10 residual blocks, as many layers. Width 128, no normalization, Adam 2.5e-4; Kron takes a
third of that. Prints one line a run and a Markdown table: accuracy on the 512 images at the end of each labelling, and
what the gradient of the first layer was.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fox_rl.diagnostics import gradient_norms
from fox_rl.networks import MultiSkipMLP
from fox_training.optimizers import build_optimizer

ARMS = {
    "plain": ("none", "adamw"),
    "multi": ("multi", "adamw"),
    "residual": ("residual", "adamw"),
    "plain-kron": ("none", "kron"),
    "multi-kron": ("multi", "kron"),
}


def digits(num_images: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(512, 64)` in [0, 1] and labels `(512,)`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("scikit-learn is missing: pip install 'fox-transformers[rl-benchmarks]'") from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:num_images] / 16.0, dtype=torch.float32), torch.tensor(labels[:num_images])


def run(arm: str, seed: int, labellings: int, options: argparse.Namespace, blocks: int = 10, width: int = 128) -> dict:
    """Accuracy at the end of each labelling, gradient norm of the first layer relative to the last, seconds."""
    torch.manual_seed(seed)
    skip, optimizer_name = ARMS[arm]
    trunk = MultiSkipMLP(64, width, width, blocks, skip=skip, norm=False)
    model = nn.Sequential(trunk, nn.ReLU(), nn.Linear(width, 10))
    if options.init == "pytorch":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    optimizer = build_optimizer(optimizer_name, model.parameters(), 2.5e-4)
    images, labels = digits()
    accuracies, begin = [], time.perf_counter()
    for labelling in range(labellings):
        if labelling:
            labels = labels[torch.randperm(len(labels))]
        for _ in range(options.epochs):
            for chosen in torch.randperm(len(labels)).split(options.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
        with torch.no_grad():
            accuracies.append(float((model(images).argmax(1) == labels).float().mean()))
    norms = list(gradient_norms(model).values())
    return {"accuracy": accuracies, "ratio": norms[0] / max(norms[-1], 1e-30), "seconds": time.perf_counter() - begin}


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: 5)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "multi"], help="default: plain multi")
    parser.add_argument("--labellings", type=int, default=4, help="times the labels are dealt out (default: 4)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of each labelling (default: 60)")
    parser.add_argument(
        "--init",
        choices=["orthogonal", "pytorch"],
        default="orthogonal",
        help="orthogonal of gain sqrt(2) as published, or that of nn.Linear (default: orthogonal)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images of an update (default: 128)")
    parser.add_argument("--quick", action="store_true", help="one seed and two labellings")
    options = parser.parse_args(argv)
    seeds, labellings = (1, 2) if options.quick else (options.seeds, options.labellings)
    torch.set_num_threads(1)
    columns = " | ".join("true labels" if i == 0 else f"relabelled {i}" for i in range(labellings))
    table = [f"| arm | seeds | {columns} | seconds a run |", "| --- " * (labellings + 3) + "|"]
    for arm in options.arms:
        results = []
        for seed in range(seeds):
            results.append(run(arm, seed, labellings, options))
            shown = " ".join(f"{x:.3f}" for x in results[-1]["accuracy"])
            print(f"{arm} seed {seed}: {shown}  gradient first/last {results[-1]['ratio']:.2e}", flush=True)
        accuracy = np.array([r["accuracy"] for r in results])
        cells = [f"{a.mean():.2f} ({a.min():.2f} to {a.max():.2f})" for a in accuracy.T]
        seconds = np.mean([r["seconds"] for r in results])
        table.append(f"| {arm} | {seeds} | {' | '.join(cells)} | {seconds:.0f} |")
    print("\n".join(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
