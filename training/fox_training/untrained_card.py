"""Write the card of a recipe that nobody has trained here: `python -m fox_training.untrained_card RECIPE CARD`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from .card import card_basics, dataset_name
from .commands import command_parser
from .models import build_model
from .recipe import Recipe, load_recipe, recipe_to_dict
from .tokenizers import byte_tokenizer

DESCRIPTION = """\
Write CARD from the recipe alone. It holds no figure of quality, since there is none:

python -m fox_training.untrained_card training/recipes/fox_pro_125m.yaml model_cards/fox-pro-125m.md

After training the card is that of the run, by `python -m fox_training.card`.
"""

TEMPLATE = """\
---
{metadata}
---

# {name}

**Not trained yet: there are no weights, and no figure of quality.** This card says what the recipe would train; speed,
and runs of other budgets, are in RESULTS.md. It is written by `python -m fox_training.untrained_card` from the recipe.

{kind}, variant {variant}:
{layers} layers, {heads} heads, width {width}, {parameters:,} parameters without the embeddings.

## Train it

```console
$ accelerate launch -m fox_training.train --recipe {path}
$ python -m fox_training.evaluate {output}/model --ngrams
$ python -m fox_training.card {output}
```

- Data: {data}. Tokenizer: {tokenizer}.
- Budget: {steps:,} steps of {rows} rows of {length:,} tokens, {tokens:,} tokens.
- Optimizer: {optimizer}, peak learning rate {rate:g}, {schedule} schedule after {warmup} steps of warm-up.
- Pruning: {pruning}.

<details><summary>The recipe</summary>

```yaml
{recipe}
```

</details>
"""

FOX = "A Forgetting Transformer (FoX, [arXiv:2503.02130](https://arxiv.org/abs/2503.02130))"
BASELINE = (
    "The Transformer that [arXiv:2503.02130](https://arxiv.org/abs/2503.02130) compares FoX with: every gate open"
)

EMBEDDINGS = ("model.embed_tokens.", "lm_head.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("untrained_card", DESCRIPTION, "RECIPE CARD")
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the YAML file")
    parser.add_argument("card", metavar="CARD", type=Path, help="the Markdown file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    try:
        args.card.write_text(untrained_card(args.recipe), encoding="utf-8")
    except (ValueError, OSError) as error:
        parser().exit(2, f"python -m fox_training.untrained_card: error: {error}\n")
    print(f"saved {args.card}")
    return 0


def untrained_card(path: Path) -> str:
    """The card of the recipe in `path`.

    Raises:
        RecipeError: If the recipe is not one, or its model cannot be built.
    """
    recipe = load_recipe(path)
    data, schedule = recipe.data, recipe.schedule
    # The model is the same for every tokenizer, but for the embeddings.
    with torch.device("meta"):
        model = build_model(recipe.model, byte_tokenizer())
    config, rows = model.config, data.batch_size
    tolerance = getattr(config, "log_pruning_tolerance", None)
    hub_data = [data.path] if data.source == "hub" else None
    return TEMPLATE.format(
        metadata=ModelCardData(datasets=hub_data, **card_basics(config.model_type)).to_yaml(),
        name=path.stem,
        kind=BASELINE if getattr(config, "fgate_type", None) == "none" else FOX,
        variant=recipe.model.variant,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size,
        parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith(EMBEDDINGS)),
        path="training/recipes/" + path.name,
        output=recipe.run.output_dir,
        data=dataset_name(recipe_to_dict(recipe)),
        tokenizer=_tokenizer(recipe),
        steps=schedule.steps,
        rows=rows,
        length=data.sequence_length,
        tokens=schedule.steps * rows * data.sequence_length,
        optimizer=recipe.optimizer.name,
        rate=recipe.optimizer.learning_rate,
        schedule=schedule.kind,
        warmup=schedule.warmup_steps,
        pruning="off" if tolerance is None else f"on, natural log of the tolerance {tolerance:g}",
        recipe=path.read_text(encoding="utf-8").strip(),
    )


def _tokenizer(recipe: Recipe) -> str:
    tokenizer = recipe.data.tokenizer
    if tokenizer.kind == "hub":
        return f"{tokenizer.path}, from the Hub"
    return f"bpe, {tokenizer.vocab_size:,} tokens" if tokenizer.kind == "bpe" else tokenizer.kind


if __name__ == "__main__":
    sys.exit(main())
