"""FoX (Pro) with pruning, without, and the Transformer (Pro), on real text: same size, same tokens, several seeds.

    python training/experiments/compare_on_real_text.py --out results/python --seconds 420
    python training/experiments/compare_on_real_text.py --out results/sotu --recipe training/recipes/sotu.yaml
    python training/experiments/compare_on_real_text.py --out runs/try --tiny         # the whole path on a CPU

1. Tokenises the recipe's data into shards on all cores.
2. Fits byte n-grams (Witten-Bell) and runs zstd -19 on the same held-out text, in the background.
3. Measures the slowest arm for a few steps and gives every run as many steps as fit into --seconds, or --steps.
4. Trains the arms one after another, all arms of a seed before the next seed: cut off, what is done is comparable.
5. After every run: summary.json, summary.md and figures; after the first pruned run: trained_gates.safetensors, log
   gates and QK-norm weights as a workload for kernels. Each run leaves recipe.yaml, metrics.jsonl and heads.jsonl.

The Transformer (Pro) is the same model with every gate open and RoPE, arXiv:2503.02130; only the gates' projections,
heads x width weights a layer, are missing in it.
"""

import argparse
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "training"))]

ARMS = {
    "fox-acp": ["model.config.log_pruning_tolerance=-10.0"],
    "fox": ["model.config.log_pruning_tolerance=null"],
    "transformer": [
        "model.config.log_pruning_tolerance=null", "model.config.fgate_type=none", "model.config.use_rope=true",
    ],
}  # fmt: skip
SLOWEST = "fox"
CALIBRATION_STEPS = 12
# Of a run besides its steps: opening the data, building the model, the evaluations, saving.
SECONDS_BESIDES = 8.0
NGRAM_ORDER = 7
TINY = [
    "model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2", "data.sequence_length=128", "data.batch_size=4",
    "data.tokenizer.vocab_size=512", "data.tokenizer.train_bytes=200000", "evaluation.max_documents=4",
    "run.threads=1", "run.compile=false",
]  # fmt: skip


def parser():
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = out.add_argument
    add("--out", type=Path, required=True, help="folder of the results; a few MB")
    add("--work", type=Path, help="folder of shards and models; default: a temporary one")
    add("--recipe", type=Path, default=ROOT / "training/recipes/python_files.yaml", help="default: %(default)s")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--seeds", type=int, default=2, help="runs of each arm; default: %(default)s")
    add("--runs", nargs="+", metavar="ARM-SEED", help="just these, as fox-acp-2 transformer-1, instead of all of both")
    add("--seconds", type=float, default=420, help="for everything; default: %(default)s")
    add("--steps", type=int, help="optimizer steps of each run; default: what fits into --seconds")
    add("--ngram-bytes", type=int, default=100_000_000, help="training text of the n-grams; default: %(default)s")
    add("--workers", type=int, help="processes that tokenise; default: one a core")
    add("--tiny", action="store_true", help="a model and rows that a CPU trains in seconds")
    return out


def main(argv=None):
    args, overrides = parser().parse_known_args(argv)
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp(prefix="fox-experiment-"))
    experiment = Experiment(args, [*(TINY if args.tiny else []), *overrides], work, began)
    try:
        experiment.run()
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)


class Experiment:
    """One comparison; everything that is known so far stands in `self.summary` and, after each run, on disk."""

    def __init__(self, args, overrides, work, began):
        self.args, self.overrides, self.work, self.began = args, overrides, work, began
        self.shards = work / "shards"
        self.baselines = None
        self.summary = {"arguments": sys.argv[1:], "runs": {}, "errors": {}}

    def say(self, text):
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def remaining(self):
        return self.args.seconds - (time.monotonic() - self.began)

    def run(self):
        self.runs()  # a mistake in --runs shows here
        self.prepare()
        # A server that was started before CUDA: its children hold no device.
        with ProcessPoolExecutor(2, get_context("forkserver")) as pool:
            texts = (str(self.shards), self.evaluated_documents(), self.args.ngram_bytes)
            self.baselines = {"ngrams": pool.submit(fit_ngrams, *texts), "zstd": pool.submit(compress, *texts[:2])}
            steps = self.args.steps or self.calibrated_steps()
            self.summary["steps"] = steps
            self.say(f"{steps} steps for each of {len(self.runs())} runs")
            longest = 0.0
            for arm, seed in self.runs():
                if self.args.steps is None and self.remaining() < 0.9 * longest:
                    self.say(f"no time left for {arm}, seed {seed}")
                    continue
                longest = max(longest, self.train(arm, seed, steps))
                self.write()
            for future in self.baselines.values():
                future.result()
        self.write()
        self.say("done")

    def runs(self):
        """Arm and seed of each run, in order."""
        if self.args.runs is None:
            return [(arm, seed) for seed in range(self.args.seeds) for arm in self.args.arms]
        named = [name.rpartition("-") for name in self.args.runs]
        wrong = [f"{arm}{dash}{seed}" for arm, dash, seed in named if arm not in ARMS or not seed.isdigit()]
        if wrong:
            raise SystemExit(f"--runs must name {', '.join(ARMS)} and a seed, as fox-acp-2; got {wrong[0]}.")
        return [(arm, int(seed)) for arm, _, seed in named]

    def evaluated_documents(self):
        from fox_training.recipe import load_recipe

        return load_recipe(self.args.recipe, self.overrides).evaluation.max_documents

    def prepare(self):
        from fox_training import provenance
        from fox_training.prepare import prepare, summary
        from fox_training.recipe import load_recipe

        described = prepare(
            load_recipe(self.args.recipe, self.overrides), self.shards, workers=self.args.workers,
            shard_bytes=8 * 2**20, say=self.say,
        )  # fmt: skip
        self.say(summary(described, self.shards))
        self.summary |= provenance.describe(
            provenance.command_line("training/experiments/compare_on_real_text.py", sys.argv[1:])
        )
        self.summary["prepared"] = {key: described[key] for key in ("seconds", "workers", "tokenizer")}
        for split, shards in described["splits"].items():
            self.summary["prepared"][split] = {k: sum(s[k] for s in shards) for k in ("documents", "bytes", "tokens")}

    def recipe(self, arm, seed, steps, out):
        from fox_training.recipe import load_recipe

        own = [
            *ARMS[arm], f"run.seed={seed}", f"run.output_dir={out}", f"schedule.steps={steps}",
            f"schedule.warmup_steps={min(steps - 1, max(5, steps // 20))}",
            f"evaluation.every_steps={math.ceil(steps / 8)}", "model.attn_implementation=fox_acp",
            "checkpoint.every_steps=0", "checkpoint.final=false", "checkpoint.export=last", "optimizer.ema_decay=0",
            "tracking.log_every_steps=10", "data.source=shards", f"data.path={self.shards}",
        ]  # fmt: skip
        return load_recipe(self.args.recipe, [*self.overrides, *own])

    def calibrated_steps(self):
        from fox_training.train import train

        out = self.work / "calibration"
        recipe = self.recipe(SLOWEST, 0, CALIBRATION_STEPS, out)
        # Two log lines: the first one holds the compilation of the kernels.
        recipe.tracking.log_every_steps = CALIBRATION_STEPS // 2
        recipe.evaluation.every_steps = 0
        train(recipe)
        last = read_lines(out / "metrics.jsonl")
        speed = max(line["tokens_per_second"] for line in last if "loss" in line)
        runs = len(self.runs())
        seconds = 0.92 * self.remaining() / runs - SECONDS_BESIDES
        tokens = recipe.data.batch_size * recipe.data.sequence_length
        self.summary["calibration_tokens_per_second"] = speed
        self.say(f"{SLOWEST} trains {speed:,.0f} tokens/s; {self.remaining():.0f} s are left for {runs} runs")
        return max(20, int(seconds * speed / tokens))

    def train(self, arm, seed, steps):
        """Train one run into OUT/ARM-SEED; returns its seconds."""
        import torch

        from fox_training.train import train

        name, began = f"{arm}-{seed}", time.monotonic()
        out = self.args.out / name
        shutil.rmtree(out, ignore_errors=True)
        try:
            reached = train(self.recipe(arm, seed, steps, out))["step"]
            if reached < steps:  # the loop has caught a signal that was meant for all runs
                raise SystemExit(f"{name} was stopped after {reached} of {steps} steps: its figures are left out.")
            if "fox-acp" not in self.summary["errors"] and arm == "fox-acp" and seed == 0:
                self.save_gates(out / "model")
            self.summary["runs"][name] = self.figures(out)
        except Exception as error:  # the other arms are worth having
            self.summary["errors"][name] = "".join(traceback.format_exception(error))
            self.say(f"{name} failed: {error}")
        finally:
            shutil.rmtree(out / "model", ignore_errors=True)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        seconds = time.monotonic() - began
        self.say(f"{name} took {seconds:.1f} s")
        return seconds

    def figures(self, out):
        lines = read_lines(out / "metrics.jsonl")
        logged = [line for line in lines if "loss" in line]
        last = [line for line in lines if "eval_loss" in line][-1]
        late = logged[len(logged) // 2 :]
        return {
            "eval_loss": last["eval_loss"],
            "eval_bits_per_byte": last["eval_bits_per_byte"],
            "tokens": logged[-1]["tokens"],
            "train_seconds": logged[-1]["train_seconds"],
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in late),
            "data_wait": statistics.mean(line["data_wait"] for line in late),
            "mfu": statistics.median(line["mfu"] for line in late) if "mfu" in late[0] else None,
            "pruned_fraction": logged[-1].get("pruned_fraction"),
        }

    def save_gates(self, model_folder):
        """trained_gates.safetensors: log gates (layers, B, H, T) in nats and the QK-norm weights (layers, H, D)."""
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        from fox_training import provenance
        from fox_training.shards import ShardFolder
        from modeling_fox import forget_gates

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(model_folder).to(device).eval()
        stream = ShardFolder(self.shards).stream("validation", verify=False)
        length = model.config.max_position_embeddings if not self.args.tiny else 128
        tensors = {}
        for name, tokens, rows in (("log_fgate", length, 2), ("log_fgate_long", 4 * length, 1)):
            count = min(len(stream.tokens) // rows, tokens)
            ids = torch.from_numpy(stream.tokens[: rows * count].astype("int64")).view(rows, count).to(device)
            with torch.no_grad(), forget_gates(model) as gates, torch.autocast(device, torch.bfloat16):
                model.model(input_ids=ids, use_cache=False)
            tensors[name] = torch.stack(list(gates)).float().cpu()
        layers = [layer.self_attn for layer in model.model.layers]
        tensors["q_norm"] = torch.stack([layer.q_norm.weight.detach().float().cpu() for layer in layers])
        tensors["k_norm"] = torch.stack([layer.k_norm.weight.detach().float().cpu() for layer in layers])
        about = {"commit": str(provenance.commit()), "trained_on": self.args.recipe.name, "rows": "held-out text"}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.args.out / "trained_gates.safetensors", about)
        self.say(f"saved the gates of {len(layers)} layers")

    def write(self):
        """summary.json, summary.md and the figures, from what there is."""
        for name, future in (self.baselines or {}).items():
            if future.done():
                self.summary[name] = future.result() if future.exception() is None else repr(future.exception())
        place = self.args.out / "summary.json"
        place.write_text(json.dumps(self.summary, indent=1), encoding="utf-8")
        text = table(self.summary)
        (self.args.out / "summary.md").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
        try:
            draw(self.args.out, self.summary)
        except ImportError as error:
            self.say(f"no figures: {error}")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def held_out_texts(shards, max_documents):
    from fox_training.shards import ShardFolder, decoded

    folder = ShardFolder(shards)
    stream = folder.stream("validation", verify=False)
    stream = stream.first_documents(max_documents) if max_documents else stream
    return [row["text"].encode() for row in decoded(stream, folder.tokenizer())]


def fit_ngrams(shards, max_documents, most_bytes):
    """Bits per byte of Witten-Bell n-grams on the held-out text, fitted on documents spread over the training text."""
    from fox_training.ngram import WittenBellNgrams
    from fox_training.shards import ShardFolder, decoded

    folder = ShardFolder(shards)
    stream = folder.stream("train", verify=False)
    stride = max(1, math.ceil(stream.num_bytes / most_bytes))
    texts = [row["text"].encode() for row in decoded(stream, folder.tokenizer(), every=stride)]
    held_out = held_out_texts(shards, max_documents)
    model = WittenBellNgrams(NGRAM_ORDER).fit(texts)
    bits = dict(enumerate(model.bits_per_byte(held_out), start=1))
    return {"bits_per_byte": bits, "fitted_on_bytes": sum(map(len, texts)), "training_bytes": stream.num_bytes}


def compress(shards, max_documents):
    """Bits per byte of zstd -19 on the held-out text in one piece, alone and behind 8 MB of training text."""
    import pyarrow

    from fox_training.shards import ShardFolder, decoded

    codec = pyarrow.Codec("zstd", compression_level=19)
    held_out = b"".join(held_out_texts(shards, max_documents))
    folder = ShardFolder(shards)
    before = b""
    for row in decoded(folder.stream("train", verify=False), folder.tokenizer()):
        before += row["text"].encode()
        if len(before) > 8e6:  # the window of level 19
            break
    size = lambda text: len(codec.compress(text, asbytes=True))  # noqa: E731
    return {
        "bits_per_byte": 8 * size(held_out) / len(held_out),
        "bits_per_byte_behind_training_text": 8 * (size(before + held_out) - size(before)) / len(held_out),
        "held_out_bytes": len(held_out),
    }


def by_arm(summary):
    arms = {}
    for name, figures in summary["runs"].items():
        arms.setdefault(name.rpartition("-")[0], []).append(figures)
    return arms


def table(summary):
    """What a reader wants first, as Markdown."""
    lines = ["| arm | seeds | bits/byte, mean (spread) | nats/token | tokens each | tokens/s | pruned at the end |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for arm, runs in by_arm(summary).items():
        bits = [run["eval_bits_per_byte"] for run in runs]
        pruned = [run["pruned_fraction"] for run in runs if run["pruned_fraction"] is not None]
        lines.append(
            f"| {arm} | {len(runs)} | {statistics.mean(bits):.4f} ({max(bits) - min(bits):.4f}) | "
            f"{statistics.mean(run['eval_loss'] for run in runs):.4f} | {runs[0]['tokens']:,} | "
            f"{statistics.median(run['tokens_per_second'] for run in runs):,.0f} | "
            f"{f'{statistics.mean(pruned):.1%}' if pruned else '-'} |"
        )
    if isinstance(summary.get("ngrams"), dict):
        order, bits = min(summary["ngrams"]["bits_per_byte"].items(), key=lambda item: item[1])
        fitted = summary["ngrams"]["fitted_on_bytes"]
        lines.append(f"\nBest Witten-Bell n-gram on the same text: order {order}, {bits:.4f} bits/byte, fitted on "
                     f"{fitted:,} bytes.")  # fmt: skip
    if isinstance(summary.get("zstd"), dict):
        alone, behind = (summary["zstd"][key] for key in ("bits_per_byte", "bits_per_byte_behind_training_text"))
        lines.append(f"zstd -19: {alone:.4f} bits/byte, {behind:.4f} behind 8 MB of training text.")
    lines += [f"{name} failed." for name in summary["errors"]]
    return "\n".join(lines)


def draw(out, summary):
    """loss.png, bits_per_byte.png, pruned_by_depth.png, and the maps of the pruned arm's heads."""
    import numpy as np

    from fox_training import plots

    losses, bits, groups = {}, {}, {}
    for name in summary["runs"]:
        lines = read_lines(out / name / "metrics.jsonl")
        logged = [line for line in lines if "loss" in line]
        per_step = logged[-1]["tokens"] / logged[-1]["step"]
        losses[name] = ([line["tokens"] for line in logged], [line["loss"] for line in logged])
        evaluated = [line for line in lines if "eval_loss" in line]
        bits[name] = (
            [line["step"] * per_step for line in evaluated], [line["eval_bits_per_byte"] for line in evaluated]
        )  # fmt: skip
        groups[name] = name.rpartition("-")[0]
    levels = {}
    if isinstance(summary.get("ngrams"), dict):
        levels["best n-gram"] = min(summary["ngrams"]["bits_per_byte"].values())
    if isinstance(summary.get("zstd"), dict):
        levels["zstd -19"] = summary["zstd"]["bits_per_byte"]
    tokens = "training tokens"
    plots.curves(out / "loss.png", losses, x=tokens, y="training loss (nats per token)", groups=groups)
    plots.curves(
        out / "bits_per_byte.png", bits, x=tokens, y="held-out text (bits per byte)", groups=groups, levels=levels
    )
    heads = read_lines(out / "fox-acp-0" / "heads.jsonl")
    if heads and "pruned_share" in heads[-1]:
        last = heads[-1]
        shares = np.array(last["pruned_share"])
        plots.curves(
            out / "pruned_by_depth.png",
            {f"step {row['step']}": (range(len(shares)), np.mean(row["pruned_share"], axis=1)) for row in heads},
            x="layer", y="share of the attention that is pruned",
        )  # fmt: skip
        plots.head_map(out / "pruned_share.png", shares, label="%", title="pruned attention", percent=True)
        lives = np.array([[1e9 if v is None else max(v, 1e-3) for v in row] for row in last["half_life_tokens"]])
        plots.head_map(out / "gate_half_life.png", lives, label="tokens", title="half-life of the gates", log=True)


if __name__ == "__main__":
    main()
