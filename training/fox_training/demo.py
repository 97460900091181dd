"""The whole path on a small text, on a CPU: `python -m fox_training.demo`, or `make demo`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from .commands import command_parser, errors_of_the_user

DESCRIPTION = """\
Train FoX on 15 State of the Union messages, measure it, write its card, reload it in a new process, generate.

The demo:        python -m fox_training.demo
Elsewhere:       python -m fox_training.demo --output-dir /tmp/demo
Another recipe:  python -m fox_training.demo --recipe my.yaml --schedule.steps 50

Dotted options change fields of the recipe. Run again it resumes, or goes straight to the measurement. The exit status
is 1 if the model does not predict the held-out message better than a byte 3-gram fitted on the same text.
"""

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
ORDER_TO_BEAT = "3"
# e^-10: no token may lose more than 4.5e-5 of its attention. A context longer than the held-out text.
PRUNED = ["--attention", "fox_acp", "--log-pruning-tolerance", "-10", "--context", "8192"]
PROMPT = "Fellow-Citizens of the Senate and House of Representatives:"

# Run by a new Python process: nothing of this one is left but the folder.
RELOAD = """\
import sys
import modeling_fox
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", add_special_tokens=False)
set_seed(0)
outputs = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.8, top_p=0.95)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("demo", DESCRIPTION, "[options] [--section.field VALUE ...]")
    add = parser.add_argument
    add("--recipe", type=Path, default=RECIPE, metavar="FILE", help="(default: training/recipes/demo.yaml)")
    add("--output-dir", type=Path, default=Path("runs/demo"), metavar="DIR", help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the demo. Returns 0, 1 if the model does not beat the 3-gram, 2 for an error of the user."""
    args, overrides = parser().parse_known_args(argv)
    with errors_of_the_user(parser()):
        return demo(args.recipe, args.output_dir, overrides)


def demo(recipe: Path, out: Path, overrides: list[str]) -> int:
    """Train, evaluate, write the card, reload, generate, sum up. Returns the exit status.

    Raises:
        ValueError: If a step cannot be done.
    """
    if not recipe.is_file():
        raise ValueError(f"--recipe must be a file, there is no {recipe}. They are in training/recipes of the source.")
    watch = Watch()
    heading(f"1. train {recipe.name} into {out}")
    from fox_training import train

    status = train.main(["--recipe", str(recipe), *overrides, "--run.output_dir", str(out)])
    watch.lap("training")
    if status or not (out / "model" / "config.json").is_file():
        return status or 1

    heading("2. evaluate on the held-out text, beside n-grams fitted on the same training text")
    from fox_training import card, evaluate

    arguments = [str(out / "model"), "--ngrams"]
    report = evaluate.evaluate(evaluate.parser().parse_args(arguments), arguments)
    print(f"saved {card.write_card(out)}")

    heading("3. the same on the whole text at once, skipping what the gates have made negligible")
    arguments = [str(out / "model"), *PRUNED, "--output-dir", str(out / "evaluation_pruned")]
    pruned = evaluate.evaluate(evaluate.parser().parse_args(arguments), arguments)
    watch.lap("evaluation")

    heading("4. reload in a new process and generate")
    print(reload_and_generate(out / "model", PROMPT))
    watch.lap("reloading and generating")

    heading("5. summary")
    beaten = report["results"]["bits_per_byte"] < report["ngrams"]["bits_per_byte"][ORDER_TO_BEAT]
    print(summary(report, pruned, watch, out))
    if not beaten:
        print(f"the model does not beat the byte {ORDER_TO_BEAT}-gram: something is wrong.", file=sys.stderr)
    return 0 if beaten else 1


class Watch:
    """Seconds of each part of the demo."""

    def __init__(self):
        self.parts: dict[str, float] = {}
        self._started = time.monotonic()

    def lap(self, name: str):
        """The time since the last lap belongs to `name`."""
        now = time.monotonic()
        self.parts[name] = now - self._started
        self._started = now


def heading(text: str):
    """A line between the parts."""
    print(f"\n== {text}", flush=True)


def reload_and_generate(model: Path, prompt: str) -> str:
    """The text that a new Python process generates after `AutoModelForCausalLM.from_pretrained(model)`.

    Raises:
        ValueError: If the process fails.
    """
    # Offline: whatever is not in the folder is missing, as it would be elsewhere.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", RELOAD, str(model), prompt], capture_output=True, text=True, env=environment
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{model} could not be reloaded in a new process: {reason}")
    return process.stdout.strip()


def summary(report: dict, pruned: dict, watch: Watch, out: Path) -> str:
    """Bits per byte beside the n-grams, what pruning saves, the time of each part, and where things are."""
    from fox_training.evaluate import ngram_table

    skipped = (
        f"{pruned['heads']['pruned_share']['mean']:.1%} of the attention over {pruned['data']['tokens']:,} tokens"
    )
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in watch.parts.items())
    return "\n".join(
        [
            ngram_table(report["ngrams"]["bits_per_byte"], report["results"]["bits_per_byte"]),
            f"  with pruning   {pruned['results']['bits_per_byte']:9.4f}   skipping {skipped}",
            "",
            f"{times}; {sum(watch.parts.values()):.0f} s in all",
            f"model and card    {out / 'model'}",
            f"measurements      {out / 'evaluation'}, {out / 'evaluation_pruned'}",
            f"training log      {out / 'metrics.jsonl'}",
            f"generate more     python -m fox_training.generate {out / 'model'} --prompt 'Fellow-Citizens'",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
