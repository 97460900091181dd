"""The evaluation command on a model that is not ours, against sums over logits that are written out here."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fox_training import evaluate, scoring
from helpers import save_tiny_llama
from modeling_fox import FoxConfig, FoxForCausalLM, pruning_stats

DOCUMENTS = ["A short one.", "The quick brown fox — naïve, 狐 — jumps over the lazy dog. " * 3, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(folder, data, tmp_path_factory):
    """evaluation.json of one run with windows, and the folder it lies in."""
    output = tmp_path_factory.mktemp("output")
    arguments = [str(folder), "--data", str(data), "--context", "24", "--overlap", "10", "--output-dir", str(output)]
    assert evaluate.main([*arguments, "--ngrams", "--ngram-data", str(data)]) == 0
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8")), output


def direct_nats(folder, context, overlap):
    """Loss of every byte, one forward call per byte with exactly the tokens the documentation promises."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    documents, contexts, hits = [], [], []
    for text in DOCUMENTS:
        ids = [256, *text.encode()]
        nats, last = [], len(ids) - 1
        windows = [range(0, min(context, last))]
        while windows[-1].stop < last:
            stop = min(last, windows[-1].stop - overlap + context)
            windows.append(range(stop - context, stop))
        for target in range(1, len(ids)):
            window = next(w for w in windows if target - 1 in w)
            with torch.no_grad():
                logits = model(torch.tensor([ids[window.start : target]])).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[ids[target]].item())
            contexts.append(target - window.start)
            hits.append(int(logits.argmax()) == ids[target])
        documents.append(nats)
    return documents, contexts, hits


def test_figures_equal_a_direct_computation_from_logits(folder, report):
    documents, _, hits = direct_nats(folder, context=24, overlap=10)
    nats = [value for document in documents for value in document]
    found = report[0]["results"]
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert len(nats) == num_bytes
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert found["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["next_token_accuracy"] == pytest.approx(np.mean(hits), abs=1e-12)


def test_position_curve_equals_a_direct_mean_over_windows_without_overlap(folder, report):
    documents, contexts, _ = direct_nats(folder, context=24, overlap=0)
    nats, contexts = np.concatenate(documents), np.array(contexts)
    with (report[1] / "per_position_loss.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["tokens"]) for row in rows) == len(nats)
    for row in rows:
        inside = nats[(contexts >= int(row["first"])) & (contexts <= int(row["last"]))]
        assert int(row["tokens"]) == len(inside)
        assert float(row["nats_per_token"]) == pytest.approx(inside.mean(), rel=1e-4)
        assert float(row["standard_error"]) == pytest.approx(inside.std() / math.sqrt(len(inside)), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 30, 100])
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_score_every_token_once_with_enough_context(length, overlap):
    windows = list(scoring.cut_windows(length, 8, overlap))
    targets = [target for w in windows for target in range(w.first_target, w.stop + 1)]
    assert targets == list(range(1, length))
    for number, window in enumerate(windows):
        assert window.stop - window.start == min(8, length - 1)
        assert window.first_target - window.start >= (overlap + 1 if number else 1)


def test_batching_does_not_change_the_figures(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    documents = [[256, *text.encode()] for text in DOCUMENTS]
    one, many = (
        scoring.score(model, documents, context=16, overlap=8, tokens_per_batch=n, progress=False) for n in (1, 4096)
    )
    np.testing.assert_allclose(one.nats, many.nats, rtol=1e-5)
    np.testing.assert_array_equal(one.position_tokens, many.position_tokens)


def test_a_loss_that_is_not_finite_is_an_error(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="document 1 a loss that is not finite"):
        scoring.score(model, [[256], [256, 1, 2]], context=8, overlap=4, progress=False)


def test_report_says_how_it_was_made(report):
    found, output = report
    assert found["windows"] == {"context": 24, "overlap": 10}
    assert found["data"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert found["data"]["lossless_documents"] == len(DOCUMENTS)
    assert found["command"].startswith("python -m fox_training.evaluate ")
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_cores"] >= 1
    assert list(found["ngrams"]["bits_per_byte"]) == ["1", "2", "3", "4", "5", "6"]
    assert (output / "per_position_loss.png").read_bytes().startswith(b"\x89PNG")


def test_prints_the_ngram_table_and_what_a_foreign_model_lacks(report):
    text = evaluate.summary(report[0], ["no pruned share"])
    for order, bits in report[0]["ngrams"]["bits_per_byte"].items():
        assert f"{order}-gram           {bits:9.4f}" in text
    assert "no pruned share" in text


def test_a_table_names_the_orders_that_are_beaten():
    assert evaluate.ngram_table({"1": 4.0, "2": 3.0, "3": 2.0}, 2.5).endswith("below orders 1, 2")
    assert evaluate.ngram_table({"1": 4.0, "2": 3.0}, 5.0).endswith("below none of them")


def test_counts_documents_that_the_tokenizer_does_not_restore(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids, lossless = evaluate.encode(tokenizer, ["abc", "Abc"])
    assert lossless == 1
    assert ids[0] == [256, 97, 98, 99]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"model": "nowhere/at/all"}, "there is no folder nowhere/at/all", id="missing-folder"),
        pytest.param({"model": "EMPTY"}, "folder with config.json", id="no-model"),
        pytest.param({"--data": None}, "--data is needed", id="no-data"),
        pytest.param({"--data": "./gone.txt"}, "--data ./gone.txt: .* does not exist", id="missing-data"),
        pytest.param({"--data": "BLANK"}, "has 1 documents and no byte", id="empty-data"),
        pytest.param({"--column": "body"}, "text_column body is no column", id="wrong-column"),
        pytest.param({"--context": "1"}, "--context must be at least 2 tokens, got 1", id="context-too-short"),
        pytest.param({"--context": "65"}, "--context must be at most 64", id="context-too-long"),
        pytest.param({"--overlap": "24"}, r"--overlap must be in \[0, 24\)", id="overlap-too-long"),
        pytest.param({"--max-documents": "0"}, "--max-documents must be at least 1", id="no-documents"),
        pytest.param({"--output-dir": "BLANK"}, "--output-dir must be writable", id="output-is-a-file"),
        pytest.param({"--attention": "nonsense"}, "could not be loaded", id="unknown-attention"),
        pytest.param({"--log-pruning-tolerance": "-10"}, "no field 'log_pruning_tolerance'", id="not-fox"),
        pytest.param({"--ngrams": True}, "--ngram-data is needed", id="ngrams-without-data"),
    ],
)
def test_says_in_one_line_what_is_wrong(change, message, folder, data, tmp_path, capsys):
    arguments = {"--data": str(data), "--context": "24", "--output-dir": str(tmp_path / "out")} | change
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "BLANK": write(tmp_path / "blank.txt", "")}
    model = arguments.pop("model", str(folder))
    line = [places.get(model, model)]
    for option, value in arguments.items():
        line += [] if value is None else [option] if value is True else [option, places.get(value, value)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(line)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_says_that_the_tokenizer_is_missing(folder, data, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "bare"), "--data", str(data), "--output-dir", str(tmp_path / "out")])
    assert "MODEL must hold a tokenizer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def fox_folder(tmp_path_factory):
    """Fixed gates: head h decays by exp(-1 / T_h) per token, T = 2 and 128, whatever the input."""
    folder = tmp_path_factory.mktemp("fox")
    config = FoxConfig.pro(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=256, eos_token_id=256, pad_token_id=257, fgate_type="bias_only", fgate_decay_time_min=2,
        fgate_decay_time_max=128, log_pruning_tolerance=-10.0,
    )  # fmt: skip
    FoxForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("llama"))).save_pretrained(folder)
    return folder


def read_heads(path):
    with path.open(encoding="utf-8") as file:
        return np.array([[float(value) for value in row[1:]] for row in list(csv.reader(file))[1:]])


def test_half_life_of_a_fixed_gate_is_its_decay_time_times_ln_2(fox_folder, data, tmp_path, capsys):
    (tmp_path / "pruned_share.csv").write_text("of an earlier evaluation", encoding="utf-8")
    arguments = [str(fox_folder), "--data", str(data), "--context", "64", "--output-dir", str(tmp_path)]
    assert evaluate.main([*arguments, "--attention", "sdpa"]) == 0
    expected = math.log(2) * np.array([[2, 128]] * 2)
    np.testing.assert_allclose(read_heads(tmp_path / "gate_half_life.csv"), expected, rtol=1e-5)
    assert (tmp_path / "gate_half_life.png").is_file()
    assert not (tmp_path / "pruned_share.csv").exists()
    assert "no pruned share: attention is sdpa, not fox_acp" in capsys.readouterr().out


def test_pruned_share_is_weighted_by_the_attended_pairs(fox_folder, tmp_path):
    texts = ["a" * 600, "b" * 300]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    arguments = [str(fox_folder), "--data", str(data), "--context", "600", "--output-dir", str(tmp_path)]
    assert evaluate.main([*arguments, "--attention", "fox_acp"]) == 0

    model = AutoModelForCausalLM.from_pretrained(fox_folder, attn_implementation="fox_acp").eval()
    skipped, pairs = 0, 0
    for text in texts:
        with torch.no_grad(), pruning_stats(model) as stats:
            model(torch.tensor([[256, *text.encode()][:-1]]))
        count = len(text) * (len(text) + 1) / 2
        skipped, pairs = skipped + count * stats.pruned_fraction.double().numpy(), pairs + count
    shares = read_heads(tmp_path / "pruned_share.csv")
    np.testing.assert_allclose(shares, skipped / pairs, rtol=1e-6)
    assert shares[0, 0] > shares[0, 1], "the head that forgets fast skips more"


def test_pruning_within_its_tolerance_does_not_move_the_loss(fox_folder, data, tmp_path):
    found = []
    for extra in (["--attention", "sdpa"], ["--attention", "fox_acp", "--log-pruning-tolerance", "-10"]):
        arguments = [str(fox_folder), "--data", str(data), "--context", "128", "--output-dir", str(tmp_path), *extra]
        assert evaluate.main(arguments) == 0
        found.append(json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["results"])
    assert found[0]["nats_per_token"] == pytest.approx(found[1]["nats_per_token"], abs=1e-3)
