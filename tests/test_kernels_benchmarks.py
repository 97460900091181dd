"""The benchmarks' own arithmetic, where a wrong figure would go unnoticed."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fox_kernels import forgetting_attention_reference
from helpers import attention_inputs, output_and_gradients

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"
pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder, which is no package."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_sampled_gradients_of_a_million_tokens_are_those_of_autograd(dtype, benchmark, monkeypatch):
    """In bfloat16 to the rounding of single products, far below the error that it is there to measure."""
    million = benchmark("million")
    monkeypatch.setattr(million, "CHUNK", 20_000)  # several chunks before, at and after the positions
    inputs = attention_inputs(batch=1, heads=2, queries=700, dim=32, gate_logits=(3.0, 7.0), dtype=torch.bfloat16)
    grad_out = torch.randn(inputs[0].shape).bfloat16()
    at = torch.tensor([90, 91, 150, 152, 440])
    wanted = output_and_gradients(
        forgetting_attention_reference, [*(x.to(dtype) for x in inputs[:3]), inputs[3]], grad_out.to(dtype)
    )
    exact = output_and_gradients(
        forgetting_attention_reference, [*(x.double() for x in inputs[:3]), inputs[3].double()], grad_out.double()
    )
    lam = inputs[3].double().cumsum(-1)
    for h in range(2):
        head = million.Head(*(x[0, h] for x in (*inputs[:3], grad_out)), lam[0, h])
        got = million.sampled(head, at, dtype, cut=60.0)
        for n, x in zip((0, 1, 4), got, strict=True):
            own = float((wanted[n][0, h, at].double() - exact[n][0, h, at]).abs().max())
            allowed = 1e-7 * float(exact[n].abs().max()) if dtype == torch.float64 else 0.3 * own
            assert float((x - wanted[n][0, h, at].double()).abs().max()) <= allowed


def test_memory_and_time_rows_do_not_mix(benchmark, tmp_path):
    common = benchmark("_common")
    path = tmp_path / "rows.csv"
    common.append_rows(path, ["op", "p50_ms"], [{"op": "fox", "p50_ms": 1.5}])
    common.append_rows(path, ["op", "p50_ms"], [{"op": "fox", "p50_ms": 2.5}])
    assert [row["p50_ms"] for row in common.read_rows(path)] == ["1.5", "2.5"]
    with pytest.raises(SystemExit, match="has other columns"):
        common.append_rows(path, ["op", "extra_mib"], [])


def test_shapes_are_read_or_refused(benchmark):
    common = benchmark("_common")
    assert common.parsed_shapes(["1,2,3,4", "5,6,7,8"], "B,H,T,D") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    for wrong in (["1,2,3"], ["1,2,3,0"], ["a,b,c,d"]):
        with pytest.raises(SystemExit, match="--shapes must be B,H,T,D, 4 whole numbers each"):
            common.parsed_shapes(wrong, "B,H,T,D")


def test_a_plot_shows_the_newest_commit(benchmark, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bench = benchmark("bench_forgetting_attention")
    rows = [
        dict.fromkeys(bench.COLUMNS, 1)
        | {"op": op, "pass": kind, "p50_ms": 2.0, "p80_ms": 3.0, "commit": commit, "gpu": "H100"}
        for commit in ("old", "new")
        for op in ("sdpa-cudnn", "fox")
        for kind in ("forward", "forward+backward")
    ]
    bench.append_rows(tmp_path / "rows.csv", bench.COLUMNS, rows)
    bench.plot(tmp_path / "rows.csv", tmp_path / "rows.png")
    assert "4 times drawn" in capsys.readouterr().out
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
