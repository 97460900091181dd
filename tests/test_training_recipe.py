"""Recipes: what is written is what is trained, and everything else is an error."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from fox_training.models import build_model
from fox_training.recipe import (
    Recipe,
    RecipeError,
    changed_keys,
    load_recipe,
    parse_overrides,
    recipe_to_dict,
    save_recipe,
    summary,
)
from fox_training.recipe_help import describe_fields
from fox_training.tokenizers import byte_tokenizer
from helpers import save_tiny_llama
from modeling_fox import FoxConfig, FoxForCausalLM

RECIPES = sorted((Path(__file__).parents[1] / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_model_can_be_built(path):
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = build_model(recipe.model, byte_tokenizer())
    for name, value in recipe.model.config.items():
        assert getattr(model.config, name) == value
    assert recipe.schedule.steps > recipe.schedule.warmup_steps


# Tokens and peak learning rates of the authors' runs, and the weights of their models with 50,257 tokens: their
# configuration and code at commit 883f260. Where they were counted with a QK-norm weight for each head, the rest is
# taken off.
PUBLISHED = {
    "fox_llama_125m": (2_684_354_560, 2e-3, 162_259_344),
    "fox_llama_360m": (7_516_192_768, 2e-3, 411_651_456),
    "fox_llama_760m_16b": (16_106_127_360, 1e-3, 834_827_328),
    "fox_llama_760m_48b": (48_318_382_080, 1e-3, 834_827_328),
    "fox_pro_125m": (2_684_354_560, 2e-3, None),
    "fox_pro_360m": (7_516_192_768, 2e-3, 418_803_072 - 24 * 2 * (1024 - 64)),
    "fox_pro_760m_16b": (16_106_127_360, 1e-3, 836_636_736),
    "fox_pro_760m_48b": (48_318_382_080, 2e-3, 836_636_736),
    "transformer_pro_125m": (2_684_354_560, 2e-3, None),
    "transformer_pro_360m": (7_516_192_768, 2e-3, None),
    "transformer_pro_760m_16b": (16_106_127_360, 1e-3, 834_937_344 - 24 * 2 * (1536 - 128)),
    "transformer_pro_760m_48b": (48_318_382_080, 1e-3, 834_937_344 - 24 * 2 * (1536 - 128)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_has_the_size_budget_and_rate_of_the_authors_runs(name):
    tokens, rate, weights = PUBLISHED[name]
    recipe = load_recipe(RECIPES[0].with_name(f"{name}.yaml"))
    assert recipe.data.batch_size * recipe.data.sequence_length == 524_288
    assert recipe.schedule.steps * 524_288 == tokens
    assert recipe.schedule.warmup_steps * 524_288 == 268_435_456
    assert (recipe.schedule.kind, recipe.schedule.final_fraction) == ("cosine", 0)
    optimizer = recipe.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.beta1, optimizer.beta2) == ("adamw", rate, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.decay_embeddings) == (0.1, 1.0, True)
    config = getattr(FoxConfig, recipe.model.variant)(**recipe.model.config | {"vocab_size": 50_257})
    assert recipe.model.config["vocab_size"] % 64 == 0 and recipe.model.config["vocab_size"] >= 50_257
    assert recipe.run.activation_checkpointing == ("760m" in name)
    is_baseline = name.startswith("transformer")
    assert (config.fgate_type, config.use_rope) == (("none", True) if is_baseline else ("full", False))
    if weights is not None:
        with torch.device("meta"):
            assert sum(p.numel() for p in FoxForCausalLM(config).parameters()) == weights


@pytest.mark.parametrize(
    "override",
    [["--optimizer.learning_rate", "1e-3"], ["--optimizer.learning_rate=1e-3"], ["optimizer.learning_rate=1e-3"]],
)
def test_three_spellings_of_an_override_mean_the_same(override):
    assert load_recipe(None, override).optimizer.learning_rate == 1e-3


def test_a_later_override_wins_over_an_earlier_one_and_over_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("schedule: {steps: 5}\n")
    assert load_recipe(tmp_path / "r.yaml").schedule.steps == 5
    assert load_recipe(tmp_path / "r.yaml", ["schedule.steps=6", "--schedule.steps", "7"]).schedule.steps == 7


def test_negative_numbers_and_lists_can_be_overridden():
    recipe = load_recipe(None, ["--model.config.log_pruning_tolerance", "-10", "data.validation_ids=[a,b]"])
    assert recipe.model.config == {"log_pruning_tolerance": -10}
    assert recipe.data.validation_ids == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1e-3", "Did you mean optimizer.learning_rate"),
        ("optimiser.learning_rate=1e-3", "Did you mean optimizer"),
        ("optimizer.lr=1e-3", "unknown recipe key optimizer.lr. Known: .* learning_rate, .*weight_decay"),
        ("data.tokenizer.kin=byte", "Did you mean data.tokenizer.kind"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be a finite number; got nan"),
        ("optimizer.learning_rate=.inf", "must be a finite number"),
        ("model.config.initializer_range=.nan", "model.config.initializer_range must be a finite number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number; got 'fast'"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be above 0; got -1"),
        ("optimizer.beta2=1", "optimizer.beta2 must be at least 0 and below 1; got 1"),
        ("schedule.steps=1.5", "schedule.steps must be an integer; got 1.5"),
        ("schedule.steps=true", "schedule.steps must be an integer; got True"),
        ("schedule.steps=0", "schedule.steps must be at least 1; got 0"),
        ("run.compile=1", "run.compile must be true or false; got 1"),
        ("optimizer.name=sgd", "optimizer.name must be one of adamw, muon, kron; got 'sgd'"),
        ("optimizer=3", "optimizer must be a section"),
        ("run.output_dir=", "run.output_dir"),
        ("data.source=hub", "data.path must name the data"),
        ("data.path=x", "data.path is only read with data.source local, hub or shards; got x with bundled"),
        ("data.source=shards", "data.path must name the data when data.source is shards"),
        ("data.source=mixture", "data.mixture lists the sources of data.source mixture; got 0 with mixture"),
        ("data.mixture=[{source: sotu}]", "data.mixture lists the sources .*; got 1 with bundled"),
        ("data.mixture=[{sourc: sotu}]", r"data.mixture\[0\].sourc. Did you mean data.mixture\[0\].source"),
        ("data.mixture=[{source: sotu, weight: -1}]", r"data.mixture\[0\].weight must be above 0; got -1"),
        ("data.validation_packages=[torch]", "data.validation_packages needs data.source python; got bundled"),
        ("data.exclude_shards=[train-00000]", "data.exclude_shards needs data.source shards"),
        ("data.tokenizer.kind=hub", "data.tokenizer.path must name a tokenizer"),
        ("data.micro_batch_size=5", "data.batch_size must be a multiple of data.micro_batch_size 5; got 32"),
        ("checkpoint.export=best", "checkpoint.export best needs validation data"),
        ("data.streaming=true", "data.streaming needs data.source local or hub"),
        ("evaluation.overlap=5000", "evaluation.overlap must be below"),
        ("steps", "'steps' is no override"),
        ("--schedule.steps", "has no value"),
    ],
)
def test_a_mistake_is_named_with_the_value_and_what_to_do(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, [override])


def test_two_ways_to_hold_out_data_contradict_each_other():
    with pytest.raises(RecipeError, match="data.validation_ids and data.validation_fraction"):
        load_recipe(None, ["data.validation_ids=[a]", "data.validation_fraction=0.1"])


def test_sources_that_do_not_go_together_are_refused():
    parts = lambda *names: f"data.mixture=[{', '.join(f'{{source: {n}, path: x}}' for n in names)}]"  # noqa: E731
    for overrides, message in (
        ([parts("shards", "local")], "shards only, or without any"),
        ([parts("local"), "data.validation_ids=[a]"], "data.mixture holds out by data.validation_fraction"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(None, ["data.source=mixture", *overrides])


def test_an_unknown_model_field_is_an_error_with_the_nearest_name():
    recipe = load_recipe(None, ["model.config.hiden_size=64"])
    with pytest.raises(RecipeError, match="model.config.hiden_size. Did you mean hidden_size"):
        build_model(recipe.model, byte_tokenizer())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hidden_size=65", "num_attention_heads=4"], "hidden_size"),
        (["hidden_size=wide"], "'hidden_size'.* expected int, got str .value: 'wide'"),
        (["use_k_shift=1"], "'use_k_shift'.* expected bool, got int .value: 1"),
    ],
)
def test_a_model_that_contradicts_itself_is_an_error_with_its_reason(overrides, message):
    recipe = load_recipe(None, [f"model.config.{override}" for override in overrides])
    with pytest.raises(RecipeError, match=message):
        build_model(recipe.model, byte_tokenizer())


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must hold sections"), ("a: [1\n", "no valid YAML"), ("dta: {}\n", "Did you mean data")],
)
def test_a_broken_file_is_an_error(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_file_names_the_one_that_was_meant(tmp_path):
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(RecipeError, match="Did you mean demo.yaml"):
        load_recipe(tmp_path / "demos.yaml")


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = load_recipe(None, ["optimizer.learning_rate=1e-3", "model.config.rms_norm_eps=1e-6"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert set(yaml.safe_load((tmp_path / "recipe.yaml").read_text())) == {f.name for f in dataclasses.fields(Recipe)}


def test_a_pretrained_model_ends_texts_by_the_tokenizer_it_is_trained_with(tmp_path):
    save_tiny_llama(tmp_path)
    for eos, expected in ((2, 256), ([2, 256], [2, 256])):
        for name in ("config.json", "generation_config.json"):
            stored = json.loads((tmp_path / name).read_text()) | {"eos_token_id": eos, "pad_token_id": None}
            (tmp_path / name).write_text(json.dumps(stored))
        model = build_model(load_recipe(None, [f"model.pretrained={tmp_path}"]).model, byte_tokenizer())
        for config in (model.config, model.generation_config):
            assert (config.eos_token_id, config.pad_token_id) == (expected, 257)


def test_the_token_between_documents_learns_and_ends_a_text(tmp_path):
    """As in GPT-2's tokenizer, which has one special token for all, and in Llama's, which has two and no padding."""
    for names, ends in (({}, 256), ({"bos_token": "<s>", "eos_token": "</s>"}, [258, 259])):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens(dict(reversed(names.items())))
        tokenizer.pad_token = tokenizer.eos_token
        model = build_model(load_recipe(None, ["model.config.num_hidden_layers=1"]).model, tokenizer)
        assert model.get_input_embeddings().padding_idx is None
        model.save_pretrained(tmp_path)
        loaded = FoxForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.eos_token_id == loaded.generation_config.pad_token_id == tokenizer.eos_token_id
        assert loaded.generation_config.eos_token_id == ends and loaded.config.pad_token_id is None


def test_only_what_changes_the_result_counts_as_a_change():
    old = recipe_to_dict(load_recipe(None))
    new = load_recipe(
        None,
        ["optimizer.beta2=0.9", "run.seed=1", "run.threads=1", "data.cache_dir=/x", "schedule.steps=7"]
        + ["data.micro_batch_size=1"],
    )
    assert changed_keys(old, recipe_to_dict(new)) == ["optimizer.beta2: 0.95 -> 0.9", "run.seed: 0 -> 1"]
    added = load_recipe(None, ["model.config.use_rope=true"])
    assert changed_keys(old, recipe_to_dict(added)) == ["model.config.use_rope: absent -> True"]


def test_help_lists_every_field_with_a_meaning_and_its_default():
    text = describe_fields()

    def names(cls, prefix):
        for item in dataclasses.fields(cls):
            value = getattr(cls(), item.name)
            path = f"{prefix}{item.name}"
            yield from names(type(value), path + ".") if dataclasses.is_dataclass(value) else [path]

    for name in names(Recipe, ""):
        block = text.split(f"--{name} ", 1)[1].split("\n  --", 1)[0]
        assert "(default:" in " ".join(block.split()), name
        assert len(block.split("(default:")[0].split()) > 3, f"{name} has no meaning"


def test_summary_shows_the_differences_only():
    assert summary(load_recipe(None)) == ""
    assert summary(load_recipe(None, ["schedule.steps=7"])).split() == ["schedule", "steps=7"]


def test_overrides_keep_an_equals_sign_in_the_value():
    assert parse_overrides(["--data.path=a=b"]) == [("data.path", "a=b")]


def test_a_batch_in_tokens_is_as_many_rows_at_any_length(tmp_path):
    recipe = load_recipe(None, ["data.batch_tokens=524288", "data.sequence_length=16384"])
    assert recipe.data.batch_size == 32
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", ["data.sequence_length=4096"]).data.batch_size == 128
    with pytest.raises(RecipeError, match=r"data.sequence_length 16384; got 500000\. Take 31 x 16384 = 507904"):
        load_recipe(None, ["data.batch_tokens=500000", "data.sequence_length=16384"])
