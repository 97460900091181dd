"""Needles, recall and the loss beyond the training length, on models whose answers are known; and shared figures."""

import contextlib
import json
import os
import re
import shutil
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from processes import server
from safetensors.torch import load_file, save_file

from fox_training import card, evaluate, long_context, scoring, verify
from fox_training.recipe import DataRecipe, ModelRecipe, Recipe, save_recipe
from fox_training.tokenizers import byte_tokenizer
from helpers import tiny_fox

HAY = ["A first sentence. And a second one, somewhat longer than the first. " * 20, "A third text! No full stop"]
CONFIG = SimpleNamespace(model_type="fox", max_position_embeddings=64)


def longest_common(found, wanted):
    """By the definition: the longest subsequence of `wanted` that is one of `found` too."""
    for size in range(len(wanted), 0, -1):
        for part in combinations(wanted, size):
            rest = iter(found)
            if all(word in rest for word in part):
                return size
    return 0


@pytest.mark.parametrize(
    "text", ["", "a b c d", "d c b a", "x a x c x d x", "A, B! c; c d", "b b a d c d", "nothing of it"]
)
def test_words_in_order_are_the_longest_common_subsequence(text):
    found = re.findall(r"\w+", text.lower())
    assert long_context.words_in_order(text, "a b c d") == longest_common(found, list("abcd")) / 4


class Reader:
    """Answers with the sentence if it stands in the prompt within `reach` tokens of its end."""

    device, config = torch.device("cpu"), CONFIG

    def __init__(self, reach):
        self.reach, self.asked = reach, []

    def generate(self, inputs, **options):
        text = bytes(t for t in inputs[0].tolist() if t < 256).decode()
        self.asked.append((inputs.shape[1], text))
        sentence = f"{long_context.START} {long_context.ANSWER}"
        knows = sentence in text[-self.reach :]
        answer = f" {long_context.ANSWER}." if knows else " sleep."
        return torch.cat([inputs, torch.tensor([list(answer.encode())])], dim=1)


@pytest.mark.parametrize("kind", ["easy", "standard"])
def test_needles_lie_where_they_should_and_the_score_is_that_of_a_reader(kind, tmp_path):
    reader = Reader(reach=450)
    progress = long_context.Progress(tmp_path / "needles.json", {"weights": 1})
    result = long_context.needle_test(reader, byte_tokenizer(), HAY, kind, 500, progress, count=4)
    assert result["lengths"][-1] == 1000 and result["depths"] == [0, 0.333, 0.667, 1]
    for number, (tokens, text) in enumerate(reader.asked):
        length, depth = result["lengths"][number // 4], result["depths"][number % 4]
        assert tokens == length
        assert text.endswith(long_context.PROMPT)
        assert text.count(long_context.NEEDLES[kind]) == 1
        before, _, after = text.removesuffix(long_context.PROMPT).partition(long_context.NEEDLES[kind])
        place = len(before) / (len(before) + len(after))
        # At most a sentence of 52 characters before the depth.
        assert depth - 53 / (len(before) + len(after)) <= place <= depth + 1e-3
        assert depth == 1 or not before or before.rstrip()[-1] in ".;"
        seen = text.rfind(f"{long_context.START} {long_context.ANSWER}") >= len(text) - 450
        score = result["scores"][number % 4][number // 4]
        assert score == (1.0 if seen else pytest.approx(0.0)), (length, depth)
    assert 0 < result["mean"] < 1
    # What is kept is not asked again, unless it is of other weights.
    again = Reader(reach=0)
    progress = long_context.Progress(tmp_path / "needles.json", {"weights": 1})
    assert long_context.needle_test(again, byte_tokenizer(), HAY, kind, 500, progress, count=4) == result
    assert not again.asked
    assert long_context.Progress(tmp_path / "needles.json", {"weights": 2}).found == {}


class Copier:
    """Guesses the token that followed the last time that the present one stood there, if that is not too long ago."""

    device, config = torch.device("cpu"), CONFIG

    def __init__(self, reach):
        self.reach = reach

    def __call__(self, input_ids, logits_to_keep, **options):
        logits = torch.zeros(*input_ids.shape, 258)
        for row, tokens in enumerate(input_ids.tolist()):
            for place, token in enumerate(tokens):
                earlier = [i for i in range(max(0, place - self.reach), place) if tokens[i] == token]
                logits[row, place, tokens[earlier[-1] + 1] if earlier else 257] = 1.0
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_recall_is_that_of_a_model_that_copies_as_far_as_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(long_context, "SAMPLES", 2)
    monkeypatch.setattr(long_context, "PAIRS", (4, 16))
    # Hay of tokens that no random block would be confused with is not to be had with bytes: keep to one character.
    hay = ["\n" * 50]
    progress = long_context.Progress(tmp_path / "recall.json", {})
    result = long_context.recall_test(Copier(reach=300), byte_tokenizer(), hay, 128, progress)
    assert result["chance"] == pytest.approx(1 / 256)
    assert list(result["repeat"]) == ["128", "256", "512"]
    # Random blocks of bytes repeat a byte here and there, which misleads it.
    assert result["repeat"]["128"] > 0.8 and result["repeat"]["256"] > 0.8 and result["repeat"]["512"] < 0.1
    assert result["pairs"]["4"] > 0.8 and result["pairs"]["16"] > 0.6


def test_loss_beyond_is_a_mean_over_positions():
    model = tiny_fox(vocab_size=97, initializer_range=0.1)
    documents = [torch.randint(1, 97, (61,)).tolist(), torch.randint(1, 97, (40,)).tolist()]
    result = long_context.loss_beyond(model, documents, 16, progress=False)
    assert result["joined"] is True and result["context"] == 64
    tokens, nats, counts = torch.tensor([sum(documents, [])]), torch.zeros(64), torch.zeros(64)
    for window in scoring.cut_windows(101, context=64, overlap=0):
        part = tokens[:, window.start : window.stop + 1]
        with torch.no_grad():
            logits = model(part[:, :-1], use_cache=False).logits[0]
        loss = F.cross_entropy(logits, part[0, 1:], reduction="none")
        scored = slice(window.first_target - window.start - 1, len(loss))
        nats[scored] += loss[scored]
        counts[scored] += 1
    assert counts.sum() == 100
    spans = {"1-8": slice(0, 8), "9-16": slice(8, 16), "17-32": slice(16, 32), "33-64": slice(32, 64)}
    expected = {name: float(nats[part].sum() / counts[part].sum()) for name, part in spans.items()}
    assert result["nats"] == pytest.approx(expected, rel=1e-5)
    long = long_context.loss_beyond(model, [*documents, [1] * 65], 16, progress=False)
    assert long["joined"] is False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of an untrained FoX, evaluated with all parts, with its card."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    model = tiny_fox(vocab_size=258, bos_token_id=256, eos_token_id=256, pad_token_id=257, attn_implementation="sdpa")
    model.save_pretrained(run / "model")
    byte_tokenizer().save_pretrained(run / "model")
    data = DataRecipe(validation_ids=["1797-Adams"], sequence_length=96, batch_size=4)
    save_recipe(Recipe(model=ModelRecipe(), data=data), run / "recipe.yaml")
    row = {"step": 20, "tokens": 1280, "loss": 4.5, "tokens_per_second": 1.0, "train_seconds": 151.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    described = {"fingerprint": "f00d", "tokenizer": {"kind": "byte", "path": None, "tokens": 258}}
    (run / "data.json").write_text(json.dumps(described), encoding="utf-8")
    assert evaluate.main([str(run), "--all", "--cells", "2", "--attention", "sdpa"]) == 0
    card.write_card(run)
    return run


def test_one_command_measures_everything_and_goes_on_from_what_is_there(run, monkeypatch, capsys):
    folder = run / "evaluation"
    report = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    for stem in ("loss_beyond", "needle_easy", "needle_standard", "recall"):
        assert (folder / f"{stem}.csv").stat().st_size and (folder / f"{stem}.png").stat().st_size
    monkeypatch.setattr(long_context, "ask", lambda *args: pytest.fail("asked again"))
    monkeypatch.setattr(long_context, "_accuracy", lambda *args: lambda: pytest.fail("guessed again"))
    assert evaluate.main([str(run), "--all", "--cells", "2", "--attention", "sdpa"]) == 0
    again = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert {x: again[x] for x in ("long_context", "needle", "recall")} == {
        x: report[x] for x in ("long_context", "needle", "recall")
    }
    out = capsys.readouterr().out
    assert "needles, standard: " in out and "recall, repeat: 96: " in out


def test_the_card_has_the_figures_of_every_part(run):
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    report = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    table = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))
    for span, nats in report["long_context"]["nats"].items():
        assert table[f"loss with {span} tokens of context (96 in training)"] == f"{nats:.4f} nats per token"
    for kind, found in report["needle"].items():
        name = f"needle in a haystack, {kind}, {found['lengths'][0]} to {found['lengths'][-1]} tokens"
        assert table[name] == f"{100 * found['mean']:.1f} % of the answer's words"
    for size, share in report["recall"]["repeat"].items():
        assert table[f"recall of a block of random tokens in {size} tokens"] == f"{100 * share:.1f} %"
    for count, share in report["recall"]["pairs"].items():
        assert table[f"recall of {count} random pairs"] == f"{100 * share:.1f} %"
    for figure in ("loss_beyond", "needle_easy", "needle_standard", "recall"):
        assert f"(figures/{figure}.png)" in text and (run / "model" / "figures" / f"{figure}.png").is_file()


def verify_elsewhere(shared, place):
    os.chdir(place)
    with open("said.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = verify.main([shared])
    sys.exit(status)


def test_a_shared_model_has_the_figures_of_its_card_in_a_fresh_process(run, tmp_path):
    shared = shutil.copytree(run / "model", tmp_path / "elsewhere")
    process = server().Process(target=verify_elsewhere, args=(str(shared), str(tmp_path)))
    process.start()
    process.join(240)
    said = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, said
    assert len(re.findall(r"card +[\d.]+ +measured +[\d.]+ +ok$", said, re.MULTILINE)) == 3


def test_other_figures_weights_or_text_do_not_pass(run, tmp_path, capsys):
    shared = shutil.copytree(run / "model", tmp_path / "elsewhere")
    report = json.loads((shared / "evaluation.json").read_text(encoding="utf-8"))
    (shared / "evaluation.json").write_text(json.dumps(report | {"results": better(report["results"])}))
    assert verify.main([str(shared)]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 1
    (shared / "evaluation.json").write_text(json.dumps(report))
    text = tmp_path / "other.txt"
    text.write_text("Another text.", encoding="utf-8")
    refused([str(shared), "--data", str(text)], "is not the text of the card: 13 bytes in 1 documents", capsys)
    weights = load_file(shared / "model.safetensors")
    weights["lm_head.weight"] *= 1.1
    save_file(weights, shared / "model.safetensors", metadata={"format": "pt"})
    refused([str(shared)], "are not those that evaluation.json was measured with", capsys)
    (shared / "README.md").unlink()
    refused([str(shared)], "must have a card", capsys)
    (shared / "evaluation.json").unlink()
    refused([str(shared)], "must have evaluation.json beside its weights", capsys)


def better(results):
    return results | {"bits_per_byte": results["bits_per_byte"] * 0.99}


def refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        verify.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
