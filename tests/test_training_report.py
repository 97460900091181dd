"""The report holds what the log says; the speed of the data is that of the batches."""

import json
import re
import time

import pytest

from fox_training import data_speed
from fox_training.batches import Batches
from fox_training.recipe import UserError, load_recipe
from fox_training.report import main, write_report


def write_run(folder):
    lines = [
        {"step": step, "tokens": 100 * step, "loss": 5.0 - step / 10, "lr": 1e-3, "grad_norm": 1.0,
         "tokens_per_second": 1000.0 * step, "train_seconds": float(step), "data_wait": 0.25, "mfu": 0.5}
        for step in range(1, 11)
    ]  # fmt: skip
    lines.insert(5, {"step": 5, "eval_loss": 3.25, "eval_bits_per_byte": 1.5, "eval_tokens": 7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heads = [{"step": 5, "half_life_tokens": [[1.0, None], [3.0, 40.0]], "pruned_share": [[0.1, 0.0], [0.5, 0.7]]}]
    (folder / "heads.jsonl").write_text("".join(json.dumps(line) + "\n" for line in heads))
    (folder / "recipe.yaml").write_text("model: {variant: pro}  # <b>\n")


def test_a_report_is_one_file_with_the_figures_of_the_log(tmp_path, capsys):
    write_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    cells = dict(re.findall(r"<th>(.*?)</th><td>(.*?)</td>", page))
    assert cells["tokens"] == "1,000" and cells["training loss (nats per token)"] == "4.0000"
    assert cells["tokens per second, median of the later half"] == "8,000"
    assert cells["MFU, median of the later half"] == "50.0%"
    assert cells["share of the time waiting for data"] == "25.00%"
    assert cells["lowest validation loss (nats per token), step 5"] == "3.2500"
    assert page.count("data:image/png;base64,iVBOR") == 7
    assert "&lt;b&gt;" in page and "http" not in page
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "none")])
    assert "must be the folder of a run; there is no folder" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 1.0}\n')
    with pytest.raises(UserError, match="metrics.jsonl must hold a logged step"):
        write_report(tmp_path)


def test_the_speed_of_the_data_counts_tokens_of_whole_steps_over_their_time(tmp_path, monkeypatch, capsys):
    recipe = load_recipe(None, ["data.sequence_length=64", "data.batch_size=4", f"data.cache_dir={tmp_path}"])

    class Slow(Batches):
        def __next__(self):
            time.sleep(0.02)
            return super().__next__()

    monkeypatch.setattr("fox_training.batches.Batches", Slow)
    figures = data_speed.measure(recipe, 0.3, warm_up=1)
    assert figures["tokens_per_second"] == pytest.approx(figures["steps"] * 4 * 64 / figures["seconds"])
    assert 1 <= figures["steps"] <= 0.5 / 0.02 and figures["tokens_per_second"] < 4 * 64 / 0.02
    write_run(tmp_path)
    assert data_speed.training_speed(tmp_path) == 8000
    with pytest.raises(UserError, match="--against must be the folder of a run"):
        data_speed.training_speed(tmp_path / "none")
    (tmp_path / "r.yaml").write_text(f"data: {{sequence_length: 64, batch_size: 4, cache_dir: {tmp_path}}}\n")
    assert data_speed.main(["--recipe", str(tmp_path / "r.yaml"), "--seconds", "0.1", "--against", str(tmp_path)]) == 0
    said = capsys.readouterr().out.split("\n")
    with pytest.raises(SystemExit):
        data_speed.main(["--recipe", str(tmp_path / "r.yaml"), "--seconds", "-1"])
    assert "--seconds must be above 0, got -1.0" in capsys.readouterr().err
    assert float(said[2].split()[1]) == pytest.approx(
        float(said[0].split()[1].replace(",", "")) / 8000, rel=0.1, abs=0.1
    )
