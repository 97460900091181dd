"""The benchmarks' own arithmetic, where a wrong figure would go unnoticed."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize("heads", [5, 12])
def test_gates_of_a_trained_model_fill_any_shape_and_its_norms_bound_the_logits(heads, benchmark, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    common, bench = benchmark("_common"), benchmark("bench_forgetting_attention")
    gates, longer = (-torch.rand(2, 1, 4, length).bfloat16() for length in (100, 300))
    norms = {name: torch.rand(2, 4, 16) + 0.5 for name in ("q_norm", "k_norm")}
    safetensors.save_file({"log_fgate": gates, "log_fgate_long": longer, **norms}, tmp_path / "gates.safetensors")
    for length, file in ((100, gates), (250, longer), (400, longer)):
        (q, k, _, got), bound = bench.workload(2, heads, length, 16, "cpu", tmp_path / "gates.safetensors")
        assert got.shape == (2, heads, length) and got.dtype == torch.float32 and bound.shape == (2, heads)
        count = min(length, file.shape[-1])
        rows = [file[layer, 0, h, :count].float() for layer in range(2) for h in range(4)]
        found = [next(i for i, row in enumerate(rows) if torch.equal(row, x[:count])) for x in got[0].detach()]
        assert len(set(found)) == min(heads, 8), "a head twice before every head once"
        logits = (q @ k.transpose(-1, -2)).float() * 16**-0.5
        assert (logits.abs().amax((2, 3)) <= bound).all()
        assert (bound <= 1.02 * 4.0 * (norms["q_norm"] * norms["k_norm"]).max()).all()
    assert common.trained(tmp_path / "gates.safetensors", 1, 3, 50, 32, "cpu").q_norm.eq(1.0).all()


def test_a_peer_that_hangs_is_ended_and_what_it_measured_before_is_kept(benchmark, tmp_path, monkeypatch, capfd):
    bench = benchmark("bench_forgetting_attention")
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys, time\n"
        "assert sys.argv[1:] == ['--shapes', '1,1,1,1', '--skip-tests', '--peer', 'official']\n"
        "print('compiling')\n"
        'print(\'ROW {"op": "official", "tested": false}\', flush=True)\n'
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    options = SimpleNamespace(limit=3.0, skip_tests=False)
    assert bench.of_a_peer("official", options, ["--shapes", "1,1,1,1"]) == [{"op": "official", "tested": True}]
    out = capfd.readouterr().out
    assert "compiling" in out and "official: ended, nothing more within 3.0 s" in out


def test_peers_take_the_first_configuration_of_a_kernel(benchmark, monkeypatch):
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "run", lambda self: self.configs)
    benchmark("_peers").without_autotuning()
    assert Autotuner.run(SimpleNamespace(configs=["first", "second"])) == ["first"]


def test_memory_is_told_as_a_ratio_to_cudnn_of_the_same_shape(benchmark):
    bench = benchmark("bench_forgetting_attention")
    rows = [
        {"op": op, **bench.sizes(shape), "extra_mib": mib, "over_cudnn": ""}
        for op, shape, mib in (
            ("fox", (1, 2, 3, 4), 3.0),
            ("sdpa-cudnn", (1, 2, 3, 4), 2.0),
            ("fox", (1, 1, 1, 1), 5.0),
        )
    ]
    assert [row["over_cudnn"] for row in bench.with_ratios(rows)] == [1.5, 1.0, ""]


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
