"""The throughput benchmark measures what it says, and the operations are those that PyTorch counts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fox_training import throughput
from fox_training.flops import flops_per_token, peak_flops
from helpers import random_tokens, tiny_fox


def test_flops_are_those_that_pytorch_counts():
    length = 96
    model = tiny_fox(num_key_value_heads=4, attn_implementation="eager", vocab_size=512)
    tokens = random_tokens(1, length)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    config = model.config
    above_diagonal = 6 * config.num_hidden_layers * length**2 * config.num_attention_heads * config.head_dim
    # Not matrix products, so not counted: norms, the bias of the gates.
    others = sum(p.numel() for n, p in model.named_parameters() if "norm" in n or p.ndim == 1)
    counted = counter.get_total_flops() - above_diagonal + 6 * others * length
    assert flops_per_token(model, length) * length == counted


def test_peaks_are_found_by_the_name_of_the_device():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 4090") is None


def test_the_benchmark_measures_all_arms(tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["--size", "tiny", "--tokens", "512", "--seconds", "0.01", "--compile", "none", "--json", str(file)]
    assert throughput.main([*arguments, "--pruned-share", "0.4"]) == 0
    arms = json.loads(file.read_text())["sizes"]["tiny"]["arms"]
    assert set(arms) == set(throughput.ARMS)
    assert arms["fox-pruned"]["pruned_share"] == pytest.approx(0.4, abs=throughput.SHARE_TOLERANCE)
    table = capsys.readouterr().out
    for name, arm in arms.items():
        rate = arm["tokens_per_second"]
        assert rate == pytest.approx(512 / torch.tensor(arm["step_seconds"], dtype=torch.float64).median().item())
        assert f"{rate / arms['transformer']['tokens_per_second']:.3f}" in table, name
    # Four steps each of the same arithmetic but for the gates; a loss of log(512) says that training steps ran.
    assert all(5.5 < arm["loss"] < 7.0 for arm in arms.values())


def test_a_share_that_cannot_be_reached_is_an_error(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--size", "tiny", "--tokens", "64", "--arms", "fox-pruned", "--pruned-share", "0.95"])
    assert "--pruned-share 0.95 cannot be reached with 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--rows", "1", "2"], r"--rows must be one number from 1 on, or one for each of ['tiny']; got [1, 2]"),
        (["--pruned-share", "70"], "--pruned-share must be in (0, 1), got 70.0"),
    ],
)
def test_arguments_that_cannot_be_followed_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--size", "tiny", *arguments])
    assert message in capsys.readouterr().err
