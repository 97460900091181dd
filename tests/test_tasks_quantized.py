"""Loaded in 8 and 4 bits by torchao and bitsandbytes: all that computes with the rounded weights, and gates untouched.

A score sums the log gates of up to all tokens before it, so that a rounded gate would be off at every step.
"""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from helpers import random_tokens, tiny_fox

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: make test-tasks")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-tasks")
    peft = pytest.importorskip("peft", reason="PEFT is not installed: make test-tasks")

pytestmark = [
    pytest.mark.tasks,
    # Of the packages behind them; nothing of ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
QUANTIZED = {
    "q_proj", "k_proj", "v_proj", "o_proj", "k_shift_proj", "v_shift_proj", "ogate_proj", "gate_proj", "up_proj",
    "down_proj",
}  # fmt: skip


def quantization(name):
    if name == "torchao int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    if name == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def dense_weight(linear):
    """What a quantized linear layer holds, as an ordinary matrix; `None` if it is not quantized."""
    weight = linear.weight
    if type(weight) is torch.nn.Parameter:
        return None
    if hasattr(weight, "quant_state"):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if weight.dtype == torch.int8:
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize()


def save_fox(folder):
    fox = tiny_fox(fgate_decay_time_min=4.0, fgate_decay_time_max=100.0)
    fox.save_pretrained(folder)
    return fox


@torch.no_grad()
def logits(model, tokens):
    return model(tokens.to(model.device), use_cache=False).logits.float().cpu()


# LLM.int8() rounds the inputs of every layer to 8 bits too, which the matrices below do not know.
@pytest.mark.parametrize(
    "name, largest_rounding, tolerance",
    [("torchao int8", 0.5 / 127, 1e-4), ("bitsandbytes int8", 0.6 / 127, 0.4), ("bitsandbytes nf4", 0.16, 1e-4)],
    ids=["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"],
)
def test_it_computes_with_the_rounded_weights_and_the_exact_gates(tmp_path, name, largest_rounding, tolerance):
    exact, tokens = save_fox(tmp_path), random_tokens(2, 30)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization(name), dtype="float32")
    rounded = save_fox(tmp_path).to(model.device)
    found = set()
    for path, module in exact.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = dense_weight(model.get_submodule(path))
            if weight is None:
                assert torch.equal(model.get_submodule(path).weight.cpu(), module.weight), path
                continue
            found.add(path.rpartition(".")[2])
            error = (weight.cpu() - module.weight).abs()
            # Each row has a scale of its own, or in 4 bits each 64 weights.
            assert error.max() > 0 and (error <= largest_rounding * module.weight.abs().amax(1, True) + 1e-6).all()
            rounded.get_submodule(path).weight.data.copy_(weight)
    assert found == QUANTIZED
    expected = logits(rounded, tokens)
    difference = (logits(model, tokens) - expected).abs()
    assert difference.max() < tolerance < 0.3 * expected.std()
    assert (logits(exact, tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4"])
def test_saved_it_loads_without_being_told(tmp_path, name):
    save_fox(tmp_path / "exact")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", quantization_config=quantization(name))
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(again.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    assert torch.equal(logits(again, random_tokens(2, 30)), logits(model, random_tokens(2, 30)))
    size = {part: sum(file.stat().st_size for file in (tmp_path / part).glob("*.safetensors"))
            for part in ("exact", "small")}  # fmt: skip
    assert size["small"] < 0.6 * size["exact"]


def test_adapters_on_four_bits_learn(tmp_path):
    save_fox(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization("bitsandbytes nf4"))
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    tokens = random_tokens(2, 12).to(model.device)
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
