"""A loss without logits is the loss with them, and so are its gradients."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_training_train import curve, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from fox_training.losses import chunked_cross_entropy, use_loss
from fox_training.recipe import RecipeError, load_recipe
from fox_training.train import train
from helpers import random_tokens, tiny_fox


def inputs(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=dtype).to(device) for n in (37, 50))
    targets = torch.randint(0, 50, (37,), generator=generator).to(device)
    targets[[0, 20, 36]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_chunks_sum_to_the_whole_and_so_do_their_gradients(chunk):
    hidden, weight, targets = inputs(torch.float64)
    whole = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    parts = chunked_cross_entropy(hidden, weight, targets, chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(whole, (hidden, weight))
    for got, exact in zip(torch.autograd.grad(parts, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("count", [None, 11])
def test_a_model_that_makes_no_logits_has_the_loss_and_gradients_of_one_that_does(tied, shifted, count):
    model = tiny_fox(tie_word_embeddings=tied).double()
    tokens = random_tokens(2, 30)
    labels = tokens.masked_fill(torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.2, -100)
    given = {"labels": labels} | ({"shift_labels": labels.roll(-1, 1)} if shifted else {})
    given |= {} if count is None else {"num_items_in_batch": count}
    expected = model(input_ids=tokens, use_cache=False, **given)
    exact = torch.autograd.grad(expected.loss, list(model.parameters()))
    logits = model(input_ids=tokens, use_cache=False).logits
    use_loss(model, "chunked")
    out = model(input_ids=tokens, use_cache=False, **given)
    assert out.logits is None
    # The model's own loss takes the logits in fp32.
    torch.testing.assert_close(out.loss.float(), expected.loss.float(), rtol=1e-6, atol=0)
    for got, wanted in zip(torch.autograd.grad(out.loss, list(model.parameters())), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, logits)


def test_a_run_with_chunks_learns_what_a_run_without_learns(tmp_path):
    full = train_tiny(tmp_path, "full")
    chunked = train_tiny(tmp_path, "chunked")
    assert full.keys() == chunked.keys()
    for step in full:
        for a, b in zip(full[step], chunked[step], strict=True):
            assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-4)


def train_tiny(folder, kind):
    path = write_recipe(folder, f"run.loss={kind}", "schedule.steps=4", out=kind)
    train(load_recipe(path))
    return curve(folder / kind)


def test_a_model_with_more_than_a_product_and_a_missing_package_are_refused(monkeypatch):
    config = AutoConfig.for_model("gemma2", vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    with torch.device("meta"):
        gemma = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RecipeError, match="run.loss must be full for model.type gemma2; got chunked"):
        use_loss(gemma, "chunked")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(RecipeError, match="pip install liger-kernel"):
        use_loss(tiny_fox(), "liger")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_is_as_accurate_as_the_logits_would_be(dtype):
    pytest.importorskip("liger_kernel")
    from fox_training.losses import _liger
    from helpers import assert_as_accurate_as_torch

    hidden, weight, targets = inputs(torch.float64, "cuda")
    exact = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    plain = F.cross_entropy(F.linear(*low).float(), targets, reduction="sum")
    fused = _liger()(*low, targets)
    assert_as_accurate_as_torch(fused, plain, exact)
    for got, same, wanted in zip(
        torch.autograd.grad(fused, low), torch.autograd.grad(plain, low), exact_grads, strict=True
    ):
        assert_as_accurate_as_torch(got, same, wanted)
