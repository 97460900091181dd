"""Write the model card of a run from its files: `python -m fox_training.card OUT`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from .commands import command_parser, errors_of_the_user

DESCRIPTION = """\
Write OUT/model/README.md, the model card, from what the run and its evaluation have recorded.

After training:     python -m fox_training.card runs/demo
With a title:       python -m fox_training.card runs/demo --title "FoX, 1 M parameters" --license apache-2.0
With measurements:  python -m fox_training.evaluate runs/demo/model --ngrams && python -m fox_training.card runs/demo

Reads recipe.yaml, data.json, metrics.jsonl, model/config.json, and if there are any environment.json and
evaluation/evaluation.json. Copies recipe.yaml, evaluation.json and the figures to OUT/model, so that the card is whole
wherever that folder goes.
"""

TEMPLATE = Path(__file__).with_name("model_card_template.md")
FIGURES = {
    "training_curve.png": "Loss during training",
    "per_position_loss.png": "Loss over the visible context",
    "pruned_share.png": "Attention skipped by pruning, per layer and head",
    "gate_half_life.png": "Half-life of the forget gates, per layer and head",
    "loss_beyond.png": "Loss beyond the length of training",
    "needle_easy.png": "Needle in a haystack, the question beside the answer",
    "needle_standard.png": "Needle in a haystack, the answer alone",
    "recall.png": "Recall of random tokens",
}
DATASETS = {
    "bundled": "State of the Union messages 1790-1803",
    "sotu": "State of the Union messages",
    "python": "Python source of installed packages",
}
METRICS = {
    "bits_per_byte": "Bits per byte",
    "perplexity": "Perplexity per token",
    "next_token_accuracy": "Next-token accuracy",
}


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("card", DESCRIPTION, "OUT [options]")
    add = parser.add_argument
    add("run", metavar="OUT", type=Path, help="folder of the run (run.output_dir of the recipe)")
    add("--title", metavar="TEXT", help="heading of the card (default: name of the folder)")
    add("--license", metavar="ID", help="licence of the weights as the Hub names it (default: none is stated)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        path = write_card(args.run, title=args.title, license=args.license)
        print(f"saved {path}")
        if not (path.parent / "evaluation.json").is_file():
            print(
                f"no measurement of these weights: run python -m fox_training.evaluate {args.run / 'model'} --ngrams"
            )
    return 0


def write_card(run: Path, *, title: str | None = None, license: str | None = None, repo: str | None = None) -> Path:
    """Write OUT/model/README.md and copy beside it what it refers to.

    Args:
        run: Folder of the run.
        title: Heading; None takes the name of the run folder.
        license: Licence of the weights; None states none.
        repo: Hub id that the example loads; None takes the local folder.

    Returns:
        Path of the card.

    Raises:
        ValueError: If a file of the run is missing, unreadable or cannot be written.
    """
    facts = read_facts(run)
    model = run / "model"
    try:
        figures = _copy_figures(run, facts)
        shutil.copyfile(run / "recipe.yaml", model / "recipe.yaml")
        (model / "evaluation.json").unlink(missing_ok=True)
        if facts["evaluation"]:
            shutil.copyfile(run / "evaluation" / "evaluation.json", model / "evaluation.json")
        path = model / "README.md"
        card = render(facts, figures, title=title or run.resolve().name, license=license, model_id=repo or str(model))
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"OUT must be writable, got {error.filename} ({error.strerror}).") from error
    return path


def read_facts(run: Path) -> dict[str, Any]:
    """Everything that a card says, from the files of the run.

    An evaluation of other weights than those in OUT/model is left out.

    Raises:
        ValueError: If a needed file is missing or unreadable.
    """
    import yaml

    from fox_training.provenance import weights_sha256

    if not run.is_dir():
        raise ValueError(f"OUT must be the folder of a run; there is no folder {run}. Train first.")
    rows = _read_rows(run / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    if not training:
        raise ValueError(f"{run / 'metrics.jsonl'} must hold logged steps, got none. Train for longer.")
    recipe_text = _read(run / "recipe.yaml")
    evaluation = _read_json(run / "evaluation" / "evaluation.json", optional=True)
    weights = weights_sha256(run / "model")
    return {
        "recipe": yaml.safe_load(recipe_text),
        "recipe_text": recipe_text.strip(),
        "data": _read_json(run / "data.json"),
        "config": _read_json(run / "model" / "config.json"),
        "parameters": _count_parameters(run / "model"),
        "start_token": _start_token(run / "model"),
        "training": training,
        "validation": [row for row in rows if "eval_loss" in row],
        "environment": _read_json(run / "environment.json", optional=True),
        "evaluation": evaluation if evaluation and evaluation.get("weights_sha256") == weights else None,
    }


def render(facts: dict[str, Any], figures: dict[str, str], *, title: str, license: str | None, model_id: str) -> str:
    """The card as text, metadata included.

    Args:
        facts: What `read_facts` returned.
        figures: File name and caption of each figure in `figures/` beside the card.
        title: Heading.
        license: Licence of the weights, or None.
        model_id: What the example passes to `from_pretrained`.
    """
    from huggingface_hub import ModelCard

    from fox_training.energy import watt_hours
    from fox_training.provenance import one_line

    last, data, evaluation = facts["training"][-1], facts["data"], facts["evaluation"]
    environment = facts["environment"]
    card = ModelCard.from_template(
        _metadata(facts, title, license),
        template_path=str(TEMPLATE),
        title=title,
        model_id=model_id,
        is_fox=facts["config"]["model_type"] == "fox",
        # An example that runs for any model: the text the recipe was trained on is not known here.
        prompt=json.dumps("The "),
        figures=figures,
        validated=exported_validation(facts),
        epochs=last["tokens"] / data["train"]["tokens"] if "train" in data else None,
        training_time=_duration(last["train_seconds"]),
        watt_hours=watt_hours(facts["training"]),
        data_description=dataset_name(facts["recipe"]),
        evaluation_data=_evaluation_data(facts) if evaluation else None,
        evaluation_hardware=one_line(evaluation["hardware"]) if evaluation else None,
        training_hardware=one_line(environment["hardware"]) if environment else None,
        versions=_versions(environment) if environment else None,
        plural=lambda count, noun: f"{count:,} {noun}" + ("" if count == 1 else "s"),
        **{key: value for key, value in facts.items() if key not in ("training", "validation")},
        training=last,
    )
    # Conditions leave runs of empty lines behind, which some Markdown renderers show.
    lines = str(card).splitlines()
    kept = [line.rstrip() for i, line in enumerate(lines) if line.strip() or (i and lines[i - 1].strip())]
    return "\n".join(kept) + "\n"


def exported_validation(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The row of metrics.jsonl that belongs to the weights in OUT/model: the best or the last; None without any."""
    rows = facts["validation"]
    if not rows:
        return None
    if facts["recipe"]["checkpoint"]["export"] == "best":
        return min(rows, key=lambda row: row["eval_loss"])
    return rows[-1]


def dataset_name(recipe: dict[str, Any]) -> str:
    """The data of a recipe in words."""
    data = recipe["data"]
    if data["source"] == "mixture":
        return ", ".join(dataset_name({"data": part}) for part in data["mixture"])
    return DATASETS.get(data["source"]) or (data["path"] if data["source"] == "hub" else Path(data["path"]).name)


def card_basics(model_type: str) -> dict[str, Any]:
    """The metadata of every card, by which the Hub finds the library, the widget and the other models of the kind."""
    tags = ["forgetting-transformer", "fox"] if model_type == "fox" else None
    return {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def _metadata(facts: dict[str, Any], title: str, license: str | None):
    from huggingface_hub import EvalResult, ModelCardData

    recipe, evaluation = facts["recipe"], facts["evaluation"]
    hub_data = recipe["data"]["path"] if recipe["data"]["source"] == "hub" else None
    results = None
    if evaluation:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_data or recipe["data"]["source"],
                dataset_name=_evaluation_data(facts),
                metric_type=metric,
                metric_name=name,
                metric_value=evaluation["results"][metric],
                verified=False,
            )
            for metric, name in METRICS.items()
        ]
    return ModelCardData(
        model_name=title if results else None,
        eval_results=results,
        license=license,
        base_model=recipe["model"]["pretrained"],
        datasets=[hub_data] if hub_data else None,
        metrics=list(METRICS) if results else None,
        **card_basics(facts["config"]["model_type"]),
    )


def _evaluation_data(facts: dict[str, Any]) -> str:
    source = facts["evaluation"]["data"]["source"]
    if "recipe.yaml" not in source:
        return Path(source).name if Path(source).is_absolute() else source
    held_out = facts["data"].get("validation", {})
    ids = held_out.get("validation_ids")
    return f"{dataset_name(facts['recipe'])}, held out" + (f" ({', '.join(ids)})" if ids and len(ids) < 5 else "")


def _versions(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _copy_figures(run: Path, facts: dict[str, Any]) -> dict[str, str]:
    """Draw the training curve, copy the figures of the evaluation; returns those that are there, in order."""
    from fox_training import plots

    folder = run / "model" / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    training, validation = facts["training"], facts["validation"]
    tokens_per_step = training[-1]["tokens"] / training[-1]["step"]
    plots.training_curve(
        folder / "training_curve.png",
        [row["tokens"] for row in training],
        [row["loss"] for row in training],
        [row["step"] * tokens_per_step for row in validation],
        [row["eval_loss"] for row in validation],
    )
    for name in FIGURES:
        if facts["evaluation"] and (run / "evaluation" / name).is_file():
            shutil.copyfile(run / "evaluation" / name, folder / name)
    return {name: caption for name, caption in FIGURES.items() if (folder / name).is_file()}


def _count_parameters(model: Path) -> int:
    """From the headers of the safetensors files, so that no weight is read; tied weights are stored once."""
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model} must hold the weights as .safetensors, got none. Finish the training first.")
    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is no dictionary
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def _start_token(model: Path) -> str:
    tokenizer = _read_json(model / "tokenizer_config.json")
    return "bos_token" if tokenizer.get("bos_token") else "eos_token"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"OUT must hold {path.name}; {path} cannot be read ({error.strerror}).") from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any] | None:
    if optional and not path.is_file():
        return None
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, got {error}. Was it written completely?") from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON Lines up to the first line that is none: a killed run leaves half a line at the end."""
    rows = []
    for line in _read(path).splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


if __name__ == "__main__":
    sys.exit(main())
