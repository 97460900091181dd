"""Measure a causal language model on held-out documents: `python -m fox_training.evaluate MODEL`."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from fox_training import documents as sources
from fox_training import suite
from fox_training.commands import add_batch_argument, add_model_arguments, command_parser, errors_of_the_user, load

DESCRIPTION = """\
Perplexity and bits per byte of a model on held-out documents.

A run of ours:      python -m fox_training.evaluate runs/demo/model --ngrams
Your own text:      python -m fox_training.evaluate runs/demo/model --data book.txt --context 1024
A model of the Hub: python -m fox_training.evaluate gpt2 --data user/dataset --split test --column text
Everything:         python -m fox_training.evaluate runs/demo/model --all

Writes evaluation.json and per_position_loss.csv/.png, for FoX also gate_half_life.csv/.png and (attention fox_acp)
pruned_share.csv/.png. Every document is scored alone, from its BOS token on; BOS itself and an end token are not
scored. Longer documents are cut into windows of --context tokens; a token beyond the first window is predicted from at
least --overlap tokens before it, and is counted once. The loss per position is taken from a second pass over windows
without overlap, so that every length of context is met equally often and all over the text.

--all adds needles in a haystack, recall and the loss to 4 times the training length, each with JSON, CSV and PNG; what
is done is kept in the output folder, and the same command goes on from there. `fox card` writes it into the card.
"""

# Without a run to take it from: logits of a window take context * vocabulary * 4 bytes.
LARGEST_DEFAULT_CONTEXT = 4096
NGRAM_ORDERS = 6
DATA_HELP = (
    "a file (.txt is one document; .jsonl and .parquet hold one per row), a folder of such files, or Hub "
    "id[:configuration] (default: the validation split of the run that MODEL lies in)"
)
CONTEXT_HELP = (
    "most tokens read at once (default: the length of training, else max_position_embeddings up to "
    f"{LARGEST_DEFAULT_CONTEXT})"
)
NGRAMS_HELP = f"fit byte n-grams of orders 1 to {NGRAM_ORDERS} (Witten-Bell) and print them beside the model"
PRUNING_HELP = "for fox_acp: -10 lets a row lose 4.5e-5 of its attention (default: as saved)"


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("evaluate", DESCRIPTION, "MODEL [options]")
    parser.add_argument("model", metavar="MODEL", help="folder of save_pretrained, run folder, or Hub id")
    _add_data_arguments(parser)
    add = parser.add_argument_group("machine").add_argument
    add_model_arguments(add)
    add("--log-pruning-tolerance", type=float, metavar="NATS", help=PRUNING_HELP)
    add_batch_argument(add)
    suite.add_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    where = "(default: evaluation/ in the run folder, else ./evaluation)"
    add("--output-dir", type=Path, metavar="DIR", help=where)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="SOURCE", help=DATA_HELP)
    add("--split", default="validation", help="of a Hub dataset (default: %(default)s)")
    add("--column", default="text", help="field that holds the text (default: %(default)s)")
    add("--max-documents", type=int, metavar="N", help="score the first N documents (default: all)")
    add = parser.add_argument_group("windows").add_argument
    add("--context", type=int, metavar="TOKENS", help=CONTEXT_HELP)
    add("--overlap", type=int, metavar="TOKENS", help="see above (default: half of --context)")
    add = parser.add_argument_group("comparison").add_argument
    add("--ngrams", action="store_true", help=NGRAMS_HELP)
    add("--ngram-data", metavar="SOURCE", help="texts to fit --ngrams on (default: the run's training split)")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        evaluate(args, argv)
    return 0


def evaluate(args: argparse.Namespace, argv: list[str]) -> dict:
    """Score, print, and write the reports. Returns what evaluation.json holds.

    Raises:
        ValueError: If an argument cannot be followed; nothing is written then.
    """
    # Imported here so that --help answers at once.
    from fox_training import pretrained, provenance, scoring

    started = time.monotonic()
    name = pretrained.resolve(args.model)
    run = sources.run_folder(name)
    suite.expand(args, has_run=run is not None)
    held_out = _held_out(args, run)
    training = _ngram_documents(args, run)
    output_dir = args.output_dir or (run / "evaluation" if run else Path("evaluation"))
    check_writable(output_dir)

    tokenizer, model = load(
        name, attention=args.attention, dtype=args.dtype, device=args.device,
        log_pruning_tolerance=args.log_pruning_tolerance,
    )  # fmt: skip
    context, overlap = _window(args, run, model.config)
    token_ids, lossless = encode(tokenizer, held_out.texts)
    options = {"context": context, "tokens_per_batch": args.tokens_per_batch}
    scores = scoring.score(model, token_ids, overlap=overlap, **options)
    # With overlap short contexts only occur where documents begin, and beginnings are all alike. Without it every
    # window starts cold, wherever it lies, and each length of context is met equally often.
    cold = scoring.score(model, token_ids, overlap=0, **options)
    report = {
        "model": name,
        "weights_sha256": provenance.weights_sha256(name),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "attention": model.config._attn_implementation,
        "log_pruning_tolerance": getattr(model.config, "log_pruning_tolerance", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "data": held_out.describe() | {"tokens": int(scores.num_tokens.sum()), "lossless_documents": lossless},
        "windows": {"context": context, "overlap": overlap},
        "results": results(scores, held_out),
        "context_gain_nats": scoring.context_gain(cold),
        "heads": _head_summary(scores.heads),
        "ngrams": _ngram_figures(training, held_out),
    } | provenance.describe(provenance.command_line("fox_training.evaluate", argv))
    key = {name: report[name] for name in ("weights_sha256", "attention", "dtype")} | {
        "data": report["data"]["sha256"]
    }
    length = _training_length(run) or context
    parts = suite.run_parts(args, model, tokenizer, held_out.texts, token_ids, length, output_dir, key)
    report |= parts | {"seconds": round(time.monotonic() - started, 1)}
    _write_reports(output_dir, report, scores.heads, cold)
    print("\n".join([summary(report, scores.heads.notes), *suite.summary(parts)]))
    print(f"saved {output_dir}")
    return report


def results(scores, held_out: sources.Documents) -> dict[str, float]:
    """Bits per byte, perplexity, accuracy and mean loss, by the metrics of this package."""
    from fox_training import metrics

    counts = scores.num_tokens.tolist()
    num_bytes = [len(text.encode()) for text in held_out.texts]
    return {
        **metrics.load("bits_per_byte").compute(nats=scores.nats.tolist(), num_bytes=num_bytes),
        **metrics.load("perplexity").compute(nats=scores.nats.tolist(), num_tokens=counts),
        **metrics.load("next_token_accuracy").compute(num_correct=scores.num_correct.tolist(), num_tokens=counts),
        "nats_per_token": scores.nats_per_token,
    }


def encode(tokenizer, texts: list[str]) -> tuple[list[list[int]], int]:
    """Token ids of each text after the start token, and how many texts decode to exactly themselves.

    Bits per byte divides by the bytes of the text, so a tokenizer that drops something would look better than it is.
    """
    from fox_training.tokenizers import document_token_id, encode_documents

    start = document_token_id(tokenizer)
    token_ids = [[start, *ids] for ids in encode_documents(tokenizer, texts)]
    pairs = zip(token_ids, texts, strict=True)
    return token_ids, sum(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text for ids, text in pairs)


def summary(report: dict, notes: list[str]) -> str:
    """What the command prints at the end, with the n-gram table if there is one."""
    data, windows, found = report["data"], report["windows"], report["results"]
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.2f} M parameters, {report['attention']}, {report['dtype']}, "
        f"{report['device']}",
        f"{data['source']}: {data['documents']} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens; "
        f"context {windows['context']}, overlap {windows['overlap']}",
        f"bits per byte {found['bits_per_byte']:.4f} | perplexity {found['perplexity']:.3f} | "
        f"loss {found['nats_per_token']:.4f} nats per token | accuracy {found['next_token_accuracy']:.1%}",
    ]
    lost = data["documents"] - data["lossless_documents"]
    if lost:
        lines.append(f"warning: the tokenizer does not restore {lost} documents exactly; bits per byte is too low.")
    gain = report["context_gain_nats"]
    if gain is not None:
        direction = "lower" if gain >= 0 else "higher"
        lines.append(f"loss with 1/2..1 of the context is {abs(gain):.4f} nats {direction} than with 1/16..1/8 of it")
    lines += notes
    if report["ngrams"]:
        lines += ["", ngram_table(report["ngrams"]["bits_per_byte"], found["bits_per_byte"])]
    return "\n".join(lines)


def ngram_table(ngrams: dict[str, float], model: float) -> str:
    """The orders and the model, one a line, and which orders the model beats."""
    lines = ["                 bits per byte"]
    lines += [f"{order}-gram           {bits:9.4f}" for order, bits in ngrams.items()]
    beaten = [order for order, bits in ngrams.items() if model < bits]
    verdict = f"below orders {', '.join(beaten)}" if beaten else "below none of them"
    return "\n".join([*lines, f"this model       {model:9.4f}   {verdict}"])


def check_writable(folder: Path):
    """Make the folder and try a file in it, before anything is computed.

    Raises:
        ValueError: If that fails.
    """
    probe = folder / ".write_test.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output-dir must be writable, got {folder} ({error.strerror}). Pass another.") from error


def _held_out(args: argparse.Namespace, run: Path | None) -> sources.Documents:
    if args.data is None and run is None:
        raise ValueError(f"--data is needed: {args.model} does not lie in a run folder with recipe.yaml.")
    if args.max_documents is not None and args.max_documents < 1:
        raise ValueError(f"--max-documents must be at least 1, got {args.max_documents}. Leave it out for all.")
    if args.data is None:
        found = sources.of_run(run, "validation")
    else:
        found = sources.from_source(args.data, split=args.split, column=args.column)
    return sources.Documents(found.texts[: args.max_documents], found.source)


def _ngram_documents(args: argparse.Namespace, run: Path | None) -> sources.Documents | None:
    if not args.ngrams:
        return None
    if args.ngram_data is not None:
        return sources.from_source(args.ngram_data, split="train", column=args.column)
    if run is None:
        raise ValueError(f"--ngram-data is needed: {args.model} does not lie in a run folder with recipe.yaml.")
    return sources.of_run(run, "train")


def _ngram_figures(training: sources.Documents | None, held_out: sources.Documents) -> dict | None:
    from fox_training.ngram import WittenBellNgrams

    if training is None:
        return None
    model = WittenBellNgrams(NGRAM_ORDERS).fit([text.encode() for text in training.texts])
    bits = model.bits_per_byte([text.encode() for text in held_out.texts])
    return {
        "fitted_on": training.describe(),
        "bits_per_byte": {str(order): value for order, value in enumerate(bits, start=1)},
    }


def _window(args: argparse.Namespace, run: Path | None, config) -> tuple[int, int]:
    largest = getattr(config, "max_position_embeddings", None)
    context = args.context
    if context is None:
        context = _training_length(run) or min(largest or LARGEST_DEFAULT_CONTEXT, LARGEST_DEFAULT_CONTEXT)
    # FoX has no positions to run out of; other models are undefined beyond theirs.
    if largest and context > largest and config.model_type != "fox":
        raise ValueError(f"--context must be at most {largest}, max_position_embeddings of the model; got {context}.")
    if context < 2:
        raise ValueError(f"--context must be at least 2 tokens, got {context}. Pass e.g. the length of training.")
    overlap = context // 2 if args.overlap is None else args.overlap
    if not 0 <= overlap < context:
        raise ValueError(f"--overlap must be in [0, {context}), the context; got {overlap}. Half of it is usual.")
    return context, overlap


def _training_length(run: Path | None) -> int | None:
    if run is None:
        return None
    from fox_training.recipe import load_recipe

    return load_recipe(run / "recipe.yaml").data.sequence_length


def _head_summary(heads) -> dict:
    """Means for the JSON; the single heads are in the CSV files. An endless half-life is written as null."""
    found = {}
    if heads.pruned_share is not None:
        found["pruned_share"] = {"mean": float(heads.pruned_share.mean()), "max": float(heads.pruned_share.max())}
    if heads.half_life_tokens is not None:
        numbers = {"min": np.min, "median": np.median, "max": np.max}
        values = {key: float(reduce(heads.half_life_tokens)) for key, reduce in numbers.items()}
        found["half_life_tokens"] = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return found


def _write_reports(folder: Path, report: dict, heads, cold):
    from fox_training import plots
    from fox_training.scoring import PositionBin, position_curve

    for stem in ("pruned_share", "gate_half_life"):
        for old in folder.glob(f"{stem}.*"):
            # Of an earlier evaluation, which this one may not replace.
            old.unlink()
    curve = position_curve(cold)
    _write_csv(folder / "per_position_loss.csv", PositionBin._fields, curve)
    plots.position_curve(
        folder / "per_position_loss.png",
        context=[math.sqrt(row.first * row.last) for row in curve],
        nats=[row.nats_per_token for row in curve],
        standard_error=[row.standard_error for row in curve],
        title="Loss over visible context",
    )
    if heads.pruned_share is not None:
        _write_heads(folder / "pruned_share.csv", heads.pruned_share)
        plots.head_map(folder / "pruned_share.png", heads.pruned_share, percent=True,
                       label="skipped attention (%)", title="Attention skipped by pruning")  # fmt: skip
    if heads.half_life_tokens is not None:
        _write_heads(folder / "gate_half_life.csv", heads.half_life_tokens)
        if np.isfinite(heads.half_life_tokens).all():
            plots.head_map(folder / "gate_half_life.png", heads.half_life_tokens, log=True,
                           label="half-life (tokens)", title="How long each head remembers")  # fmt: skip
    with (folder / "evaluation.json").open("w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, allow_nan=False)
        file.write("\n")


def _write_heads(path: Path, values: np.ndarray):
    layers, heads = values.shape
    _write_csv(
        path, ["layer", *(f"head_{h}" for h in range(heads))], [[i, *values[i].tolist()] for i in range(layers)]
    )


def _write_csv(path: Path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
