"""The endless stream: read, followed, written, limited and drawn."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fox_training.cache_plot import plot_cache
from modeling_fox import CacheReport

SCRIPT = Path(__file__).resolve().parents[1] / "training" / "examples" / "endless_stream.py"


@pytest.fixture
def stream():
    spec = importlib.util.spec_from_file_location("endless_stream", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_is_read_in_constant_memory_and_drawn(stream, tmp_path, capsys):
    (tmp_path / "text.bin").write_bytes(bytes(range(256)) * 8)
    arguments = ["--file", str(tmp_path / "text.bin"), "--every", "400", "--step", "100", "--decay-time", "4"]
    assert stream.main([*arguments, "--plot", str(tmp_path / "memory.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("keys live") == 5 and "the cache stays as it was" in out and "proven" in out
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_that_of_the_whole_text_at_once(stream, tmp_path):
    options = stream.argparse.Namespace(step=7, seed=0, model=None, decay_time=8.0)
    model, encode = stream.load(options)
    cache = stream.FoxEvictingCache(model.config)
    tokens = encode(bytes(range(60, 110)))
    with torch.no_grad():
        model.eval()
        found = list(stream.read(model, cache, iter(tokens), options))
        ids = torch.tensor([tokens])
        expected = model(ids, labels=ids, use_cache=False).loss
    # The first token has no one to foresee it.
    total = sum(loss * (number - (i == 0)) for i, (loss, number) in enumerate(found))
    assert total / (len(tokens) - 1) == pytest.approx(float(expected), abs=1e-4)


def test_it_writes_by_itself(stream, capsys):
    assert stream.main(["--generate", "--tokens", "60", "--every", "20", "--decay-time", "2"]) == 0
    assert capsys.readouterr().out.count("keys live") == 3


def test_a_character_may_lie_on_the_border_of_two_pieces(stream, monkeypatch):
    monkeypatch.setattr(stream.AutoModelForCausalLM, "from_pretrained", lambda name: None)

    def letters(text, **options):
        return {"input_ids": [ord(x) for x in text]}

    monkeypatch.setattr(stream.AutoTokenizer, "from_pretrained", lambda name: letters)
    _, encode = stream.load(stream.argparse.Namespace(model="some"))
    text = "a\u00e4\u20ac".encode()
    assert [x for i in range(len(text)) for x in encode(text[i : i + 1])] == [97, 228, 8364]


def test_says_what_cannot_be(stream, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stream.main(["--follow"])
    with pytest.raises(SystemExit):
        stream.main(["--file", str(tmp_path / "nothing")])
    assert "--file must be a file; got" in capsys.readouterr().err
    report = CacheReport(0, torch.zeros(1, 1, 1, dtype=torch.int32), 0, 0, 0.0, True)
    for reports, numbers in (([], None), ([report], [1, 2])):
        with pytest.raises(ValueError, match="`reports` must hold at least one report, and `process_bytes` as many"):
            plot_cache(reports, tmp_path / "x.png", numbers)
