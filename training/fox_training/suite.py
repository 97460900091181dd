"""The parts of `fox evaluate` beside the held-out loss: each can be asked for, is kept, and has its figure."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("long_context", "needle", "recall", "lm_eval")
LM_EVAL_HELP = (
    "tasks of lm-eval by its `hf` model, comma-separated, e.g. wikitext,lambada_openai,piqa,hellaswag,winogrande,"
    "arc_easy,arc_challenge,boolq,sciq,copa,openbookqa, those of the paper (needs the package, and the Hub)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all parts."""
    add = parser.add_argument_group("more").add_argument
    add("--all", action="store_true", help="--long-context, --needle, --recall, and --ngrams where there is a run")
    add("--long-context", action="store_true", help="loss per position up to 4 times the training length")
    add(
        "--needle", action="store_true", help="a sentence hidden in the held-out text, easy and standard, as heat maps"
    )
    add("--recall", action="store_true", help="random tokens repeated after a distance, and pairs asked for again")
    add("--lm-eval", metavar="TASKS", help=LM_EVAL_HELP)
    add("--cells", type=int, default=11, metavar="N", help="lengths and depths of a heat map (default: %(default)s)")
    add("--again", action="store_true", help="compute figures anew that an earlier call has left in --output-dir")


def expand(args: argparse.Namespace, has_run: bool) -> None:
    """What --all stands for.

    Raises:
        ValueError: If --cells is too small for a map.
    """
    if args.cells < 2:
        raise ValueError(f"--cells must be at least 2, got {args.cells}: a map has two ends.")
    if args.all:
        args.long_context = args.needle = args.recall = True
        args.ngrams = args.ngrams or has_run or args.ngram_data is not None


def run_parts(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str],
    token_ids: list[list[int]], length: int, folder: Path, key: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Figures of the parts that are asked for, by their names; figures and CSV files go to `folder`.

    Args:
        args: The command line.
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        texts: Held-out documents; the hay of the needles too.
        token_ids: The same, start token first.
        length: Tokens in a row of training.
        folder: Of all output; what is computed is kept in `folder/parts`.
        key: What identifies model and data.

    Raises:
        ValueError: If a part cannot be done; the parts before it are kept.
    """
    from . import long_context

    parts = folder / "parts"
    parts.mkdir(exist_ok=True)

    def kept(name: str, **settings: Any) -> long_context.Progress:
        if args.again:
            (parts / f"{name}.json").unlink(missing_ok=True)
        return long_context.Progress(parts / f"{name}.json", key | {"length": length} | settings)

    for name in ("loss_beyond", "needle_easy", "needle_standard", "recall"):
        for old in folder.glob(f"{name}.*"):  # of an earlier call, which this one may not replace
            old.unlink()
    found: dict[str, Any] = {}
    if args.long_context:
        found["long_context"] = kept("long_context").get(
            "figures",
            lambda: long_context.loss_beyond(model, token_ids, length, tokens_per_batch=args.tokens_per_batch),
        )
        draw_loss(folder, found["long_context"])
    if args.needle:
        found["needle"] = {}
        for kind in long_context.NEEDLES:
            progress = kept(f"needle_{kind}", cells=args.cells)
            result = long_context.needle_test(model, tokenizer, texts, kind, length, progress, count=args.cells)
            draw_needles(folder, kind, result)
            found["needle"][kind] = result
    if args.recall:
        found["recall"] = long_context.recall_test(
            model, tokenizer, texts, length, kept("recall"), tokens_per_batch=args.tokens_per_batch
        )
        draw_recall(folder, found["recall"], length)
    if args.lm_eval:
        progress = kept("lm_eval")
        tasks = [task.strip() for task in args.lm_eval.split(",") if task.strip()]
        found["lm_eval"] = {
            task: progress.get(task, lambda task=task: lm_eval(model, tokenizer, task)) for task in tasks
        }
    return found


def lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> dict[str, float]:
    """Figures of a task of lm-eval, zero-shot, by its `hf` model around this one.

    Raises:
        ValueError: If lm-eval is missing, has no such task, or cannot load its data.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError("--lm-eval needs the package lm-eval: pip install 'fox-transformers[tasks]'.") from error
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True)
        results = simple_evaluate(wrapped, tasks=[task], num_fewshot=0, bootstrap_iters=0)["results"]
    except Exception as error:  # of any kind: unknown task, no network, a data set that has moved
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--lm-eval {task} failed: {reason}") from error
    figures = {name: value for values in results.values() for name, value in values.items()}
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}


def summary(found: dict[str, Any]) -> list[str]:
    """One line a part, for the end of the command."""
    lines = []
    if "long_context" in found:
        values = ", ".join(f"{span}: {nats:.4f}" for span, nats in found["long_context"]["nats"].items())
        lines.append(f"loss in nats per token by tokens of context: {values}")
    for kind, result in found.get("needle", {}).items():
        longest = result["lengths"][-1]
        lines.append(f"needles, {kind}: {result['mean']:.1%} of the answers' words, contexts to {longest} tokens")
    if "recall" in found:
        for task, values in found["recall"].items():
            if task != "chance":
                lines.append(f"recall, {task}: " + ", ".join(f"{k}: {v:.1%}" for k, v in values.items()))
    lines += [f"lm-eval {task}: {figures}" for task, figures in found.get("lm_eval", {}).items()]
    return lines


def draw_loss(folder: Path, result: dict[str, Any]) -> None:
    """loss_beyond.csv and .png."""
    from . import plots

    curve = result["curve"]
    _write_csv(folder / "loss_beyond.csv", list(curve[0]), [list(row.values()) for row in curve])
    plots.position_curve(
        folder / "loss_beyond.png",
        context=[(row["first"] * row["last"]) ** 0.5 for row in curve],
        nats=[row["nats_per_token"] for row in curve],
        standard_error=[row["standard_error"] for row in curve],
        title=f"Loss up to {result['context']:,} tokens, {result['training_length']:,} in training",
    )


def draw_needles(folder: Path, kind: str, result: dict[str, Any]) -> None:
    """needle_KIND.csv and .png."""
    from .plots import _figure, _save

    lengths, depths, scores = result["lengths"], result["depths"], np.array(result["scores"])
    rows = [[depth, *values] for depth, values in zip(depths, scores.tolist(), strict=True)]
    _write_csv(folder / f"needle_{kind}.csv", ["depth", *lengths], rows)
    figure, axes = _figure(8.0, 4.2)
    image = axes.imshow(100 * scores, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="words of the answer (%)")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"Needle in a haystack, {kind}: {result['mean']:.0%}")
    _save(figure, folder / f"needle_{kind}.png")


def draw_recall(folder: Path, result: dict[str, Any], length: int) -> None:
    """recall.csv and .png."""
    from .plots import _figure, _save

    rows = [[task, size, value] for task in ("repeat", "pairs") for size, value in result[task].items()]
    _write_csv(folder / "recall.csv", ["task", "size", "accuracy"], rows)
    figure, axes = _figure(6.4, 4.0)
    sizes = [int(size) for size in result["repeat"]]
    axes.plot(sizes, [100 * x for x in result["repeat"].values()], marker="o", label="repeated block")
    pairs = [4 * int(count) + 1 for count in result["pairs"]]
    axes.plot(pairs, [100 * x for x in result["pairs"].values()], marker="s", label="pairs, asked for again")
    axes.axhline(100 * result["chance"], color="grey", linestyle="--", linewidth=1, label="chance")
    axes.axvline(length, color="grey", linewidth=1, label="training length")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 100)
    axes.set_xlabel("tokens in all")
    axes.set_ylabel("right first guesses (%)")
    axes.set_title("Recall of random tokens")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, folder / "recall.png")


def _write_csv(path: Path, header: list[Any], rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
