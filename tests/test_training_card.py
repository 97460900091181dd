"""Model cards and publishing: every figure comes from the files of the run, and a dry run touches no network."""

import json
import re
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from fox_training import card, evaluate, publish
from fox_training.recipe import DataRecipe, ModelRecipe, Recipe, save_recipe
from helpers import save_tiny_llama, tiny_fox

ROWS = [
    {"step": 10, "tokens": 640, "loss": 5.25, "tokens_per_second": 111.0, "train_seconds": 5.0},
    {"step": 20, "eval_loss": 4.125, "eval_bits_per_byte": 5.9512, "eval_tokens": 100, "train_seconds": 151.0},
    {"step": 20, "tokens": 1280, "loss": 4.5, "tokens_per_second": 987654.0, "train_seconds": 151.0},
]
ENVIRONMENT = {
    "command": "python -m fox_training.train --recipe some.yaml",
    "commit": "0123abcd",
    "hardware": {"cpu": "a CPU", "cpu_cores": 3, "memory_gib": 1.0, "gpus": ["GPU of the test"] * 4},
    "versions": {"python": "3.14.0", "torch": "9.8.7"},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run folder as training leaves it, evaluated on its own held-out document."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    save_tiny_llama(run / "model")
    recipe = Recipe(
        model=ModelRecipe(type="llama"),
        data=DataRecipe(validation_ids=["1797-Adams"], sequence_length=48, batch_size=4),
    )
    save_recipe(recipe, run / "recipe.yaml")
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + '\n{"step": 30, "lo', encoding="utf-8")
    data = {
        "fingerprint": "f00dfeed", "tokenizer": {"kind": "byte", "path": None, "tokens": 258},
        "train": {"fingerprint": "f00dfeed", "documents": 14, "tokens": 256, "bytes": 175027},
        "validation": {"documents": 1, "tokens": 12443, "bytes": 12442, "validation_ids": ["1797-Adams"]},
    }  # fmt: skip
    (run / "data.json").write_text(json.dumps(data), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    assert evaluate.main([str(run), "--ngrams"]) == 0
    return run


@pytest.fixture
def run(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "tiny")


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_ngrams_on_the_bundled_corpus_give_the_published_figures(measured):
    """Witten-Bell on State of the Union 1790-1803 without 1797-Adams, computed once with dictionaries of counts."""
    report = json.loads((measured / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    expected = [4.2806, 3.3232, 2.5514, 1.9247, 1.6520, 1.6137]
    assert list(report["ngrams"]["bits_per_byte"].values()) == pytest.approx(expected, abs=5e-5)
    assert report["ngrams"]["fitted_on"]["bytes"] == 175027
    assert report["data"]["bytes"] == report["data"]["tokens"] == 12442


def test_a_run_is_evaluated_on_its_own_split_with_its_own_length(measured):
    report = json.loads((measured / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert report["windows"] == {"context": 48, "overlap": 24}
    assert report["data"]["source"].startswith("validation documents of ")


def test_metadata_holds_the_measured_values(run):
    found = metadata(card.write_card(run, license="apache-2.0").read_text(encoding="utf-8"))
    results = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["results"]
    measured = {metric["type"]: metric["value"] for metric in found["model-index"][0]["results"][0]["metrics"]}
    assert measured == {name: results[name] for name in ("bits_per_byte", "perplexity", "next_token_accuracy")}
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == (
        "apache-2.0", "transformers", "text-generation",
    )  # fmt: skip


def test_figures_of_the_text_follow_the_files(run):
    def change(report):
        report["results"] |= {"bits_per_byte": 1.2345, "perplexity": 77.625, "next_token_accuracy": 0.4321}
        report["ngrams"]["bits_per_byte"]["3"] = 2.7182

    edit(run / "evaluation" / "evaluation.json", change)
    edit(run / "data.json", lambda data: data["train"].update(bytes=7654321, tokens=512))
    text = card.write_card(run).read_text(encoding="utf-8")
    for figure in ("| 1.2345 | 77.625 | 43.2 % |", "2.718 |", "7,654,321 bytes", "987,654 tokens/s", "2.5 minutes"):
        assert figure in text
    assert "1,280 tokens (2.5 epochs)" in text
    assert "4 x GPU of the test" in text
    assert "torch 9.8.7" in text
    assert ENVIRONMENT["command"] in text
    assert "`0123abcd`" in text


@pytest.mark.parametrize(("export", "step", "figure"), [("best", 10, "1.1111"), ("last", 30, "3.3333")])
def test_the_validation_is_that_of_the_exported_weights(run, export, step, figure):
    """Training that overfits: the last evaluation belongs to weights that the run threw away."""
    shutil.rmtree(run / "evaluation")
    rows = [
        {"step": 10, "eval_loss": 0.77, "eval_bits_per_byte": 1.1111},
        {"step": 30, "eval_loss": 2.31, "eval_bits_per_byte": 3.3333},
    ]
    kept = [row for row in ROWS if "eval_loss" not in row]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept + rows)), encoding="utf-8")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["checkpoint"]["export"] = export
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    text = card.write_card(run).read_text(encoding="utf-8").split("```yaml")[0]
    assert f"those of step {step}" in text and f"{figure} bits per byte" in text
    assert ("the best of the run" in text) == (export == "best")


def test_no_field_of_the_template_is_left_empty(run):
    text = card.write_card(run).read_text(encoding="utf-8")
    body = text.split("```yaml")[0].split("---\n", 2)[2] + text.split("</details>")[1]
    assert not re.search(r"\{\{|\}\}|\{%|None|nan|Undefined|<function", body)
    assert "\n\n\n" not in text
    assert "import modeling_fox" not in text, "this model is a Llama"


def test_the_example_of_the_card_runs(run, capsys):
    text = card.write_card(run).read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=100", "max_new_tokens=3")
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("The ")


def test_files_that_the_card_refers_to_lie_beside_it(run):
    text = card.write_card(run).read_text(encoding="utf-8")
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (run / "model" / name).read_bytes().startswith(b"\x89PNG")
    assert "figures/training_curve.png" in text
    assert (run / "model" / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()


def test_measurements_of_other_weights_are_left_out(run, capsys):
    card.write_card(run)
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert card.main([str(run)]) == 0
    assert "no measurement of these weights" in capsys.readouterr().out
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in text
    assert "those of step 20:\n5.9512 bits per byte, 4.1250 nats" in text
    assert not (run / "model" / "evaluation.json").exists()
    assert "per_position_loss" not in text


def test_works_without_what_is_optional(run):
    (run / "environment.json").unlink()
    shutil.rmtree(run / "evaluation")
    text = card.write_card(run).read_text(encoding="utf-8")
    assert "Hardware" not in text
    assert "## Results" in text


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "data.json", "metrics.jsonl", "model/config.json", "model/model.safetensors"]
)
def test_names_the_file_that_is_missing(run, name, capsys):
    (run / name).unlink()
    with pytest.raises(SystemExit):
        card.main([str(run)])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert name.split("/")[-1].removeprefix("model") in error


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_dry_run_prints_the_files_and_the_card_without_a_network(run, capsys, no_network):
    (run / "model" / "notes of mine.txt").write_text("not for the Hub", encoding="utf-8")
    assert publish.main([str(run), "--repo", "me/fox-tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^ *[\d,]+  (\S.*)$", out, re.MULTILINE)
    assert listed == [
        "README.md", "config.json", "evaluation.json", "figures/per_position_loss.png", "figures/training_curve.png",
        "generation_config.json", "model.safetensors", "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (run / "model" / "README.md").read_text(encoding="utf-8") in out
    assert 'from_pretrained("me/fox-tiny")' in out


def test_the_code_goes_along_if_asked(run, capsys, no_network):
    tiny_fox().save_pretrained(run / "model")
    assert publish.main([str(run), "--repo", "me/fox-tiny", "--dry-run", "--with-code"]) == 0
    listed = re.findall(r"^ *[\d,]+  (\S*_fox\.py)$", capsys.readouterr().out, re.MULTILINE)
    assert "modeling_fox.py" in listed and "modeling_heads_fox.py" in listed
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_fox.FoxForCausalLM"


def test_publishing_is_one_repository_and_one_commit(run, capsys, monkeypatch, no_network):
    calls = []

    class RecordedApi:
        def create_repo(self, *args, **kwargs):
            calls.append(("create_repo", args, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", kwargs))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", RecordedApi)
    assert publish.main([str(run), "--repo", "me/fox-tiny", "--private"]) == 0
    assert calls == [
        ("create_repo", ("me/fox-tiny",), {"private": True, "exist_ok": True}),
        ("upload_folder", {
            "repo_id": "me/fox-tiny", "folder_path": run / "model", "allow_patterns": publish.PATTERNS,
            "commit_message": "Upload fox-tiny",
        }),
    ]  # fmt: skip
    assert "published https://hub/commit/1" in capsys.readouterr().out


def test_a_missing_login_is_one_line(run, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(SystemExit):
        publish.main([str(run), "--repo", "me/fox-tiny"])
    assert capsys.readouterr().err.endswith("Token is required. Is `hf auth login` done?\n")


@pytest.mark.parametrize("repo", ["fox", "a/b/c", "me/fox tiny"])
def test_refuses_a_name_that_is_none_of_the_hub(run, repo, capsys):
    with pytest.raises(SystemExit):
        publish.main([str(run), "--repo", repo, "--dry-run"])
    assert f"--repo must be USER/NAME, got {repo}" in capsys.readouterr().err


def test_energy_is_told_where_it_was_measured(run):
    assert "kWh" not in card.write_card(run).read_text(encoding="utf-8")
    rows = [row | {"gpu_watts": 600.0} if "loss" in row else row for row in ROWS]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    # 151 seconds at 600 W.
    assert "- Energy: 0.0252 kWh of the GPUs alone" in card.write_card(run).read_text(encoding="utf-8")
