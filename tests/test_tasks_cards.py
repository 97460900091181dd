"""Every recipe has a model card: that of a run, or one that says that there was none."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from fox_training.card import METRICS
from fox_training.untrained_card import main, untrained_card

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def card_of(recipe):
    name = "fox-" + recipe.stem.replace("_", "-").removeprefix("fox-")
    return (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_card_of_a_recipe_is_of_a_run_or_says_that_there_was_none(recipe):
    """Else, for one without a run: `python -m fox_training.untrained_card RECIPE CARD`."""
    card = card_of(recipe)
    if "Not trained yet" in card:
        assert card == untrained_card(recipe)
    else:
        assert f"--recipe training/recipes/{recipe.name}" in card and "bits per byte" in card


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_hub_reads_its_metadata(recipe):
    """By the Hub's own library, without its service: what it does not know it would refuse or drop."""
    card, source = ModelCard(card_of(recipe)), yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["forgetting-transformer", "fox"]
    results = card.data.eval_results or []
    assert [x.metric_type for x in results] == ([] if "Not trained yet" in card.text else list(METRICS))
    assert card.data.metrics == ([x.metric_type for x in results] or None)
    if "Not trained yet" in card.text:
        assert card.data.datasets == ([source["path"]] if source.get("source") == "hub" else None)
    else:
        bits, perplexity, accuracy = (x.metric_value for x in results)
        assert f"| {bits:.4f} | {perplexity:.3f} | {100 * accuracy:.1f} % |" in card.text


def test_a_card_without_a_run_says_what_the_recipe_says(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "model: {variant: llama, config: {hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2,"
        " num_attention_heads: 2}}\ndata: {batch_size: 6, sequence_length: 50}\nschedule: {steps: 1000}\n"
    )
    assert main([str(recipe), str(tmp_path / "card.md")]) == 0
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    # 4 * 32 * 32 of attention, 2 * 33 of gates, 3 * 32 * 40 of the MLP and 2 * 32 of norms a layer, and 32 of a norm.
    assert f"{2 * (4 * 32 * 32 + 2 * 33 + 3 * 32 * 40 + 2 * 32) + 32:,} parameters without the embeddings" in card
    assert "1,000 steps of 6 rows of 50 tokens, 300,000 tokens" in card and "Pruning: off" in card
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.yaml"), str(tmp_path / "card.md")])
    assert "none.yaml" in capsys.readouterr().err
