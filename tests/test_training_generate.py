"""The generation command against greedy and seeded decoding through plain transformers."""

import io
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fox_training import generate
from helpers import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def greedy(folder, prompt, count):
    """Argmax step by step over the whole sequence, no cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [256, *prompt.encode()]
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 256:
            break
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_temperature_zero_is_the_argmax_at_every_step(folder, capsys):
    assert generate.main([str(folder), "--prompt", "The fox ", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == greedy(folder, "The fox ", 12)
    assert re.search(r"^\d+ tokens in [\d.]+ s, \d+ tokens/s$", captured.err, re.MULTILINE)


def test_same_seed_gives_the_same_text_and_another_seed_another(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        generate.main([str(folder), "--prompt", "fox", "--max-new-tokens", "20", "--temperature", "2", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_reads_the_prompt_from_stdin(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("piped prompt"))
    generate.main([str(folder), "--prompt", "-", "--max-new-tokens", "2", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("piped prompt")


def test_an_empty_prompt_starts_a_document(folder, capsys):
    generate.main([str(folder), "--prompt", "", "--max-new-tokens", "4", "--temperature", "0"])
    assert capsys.readouterr().out.rstrip("\n") == greedy(folder, "", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"model": "./gone"}, "there is no folder ./gone", id="missing-folder"),
        pytest.param({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0", id="no-tokens"),
        pytest.param({"--max-new-tokens": "99"}, "must be at most 60 after 4 tokens of prompt, got 99", id="too-long"),
        pytest.param({"--temperature": "-1"}, "--temperature must be 0 or above, got -1.0", id="temperature"),
        pytest.param({"--temperature": "nan"}, "--temperature must be 0 or above, got nan", id="temperature-nan"),
        pytest.param({"--top-p": "95"}, r"--top-p must be in \(0, 1\], got 95.0: a probability", id="percentage"),
        pytest.param({"--seed": "-1"}, "--seed must be in", id="seed"),
        pytest.param({"--attention": "fox_acp"}, "fox_acp needs forget gates", id="attention-of-another-model"),
        pytest.param({"--device": "cuda:99"}, "--device must be one that .* got cuda:99", id="device"),
        pytest.param({"--max-tokens": "3"}, "unrecognized arguments: --max-tokens 3", id="misspelt"),
    ],
)
def test_says_in_one_line_what_is_wrong(change, message, folder, capsys):
    arguments = {"--prompt": "fox"} | change
    line = [arguments.pop("model", str(folder))]
    with pytest.raises(SystemExit) as stopped:
        generate.main([*line, *(part for pair in arguments.items() for part in pair)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
