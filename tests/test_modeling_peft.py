"""LoRA by PEFT: trained, saved, loaded and merged."""

import pytest
import torch

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxEvictingCache, FusedStep

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
# Transformers 5.23 renames these; PEFT 0.21 and 5.17 know the old names only.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")


def lora(model, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | options))
    return peft.get_peft_model(model, config)


def train(model, tokens, steps=30):
    """Losses of learning one batch by heart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_projection_gets_an_adapter_and_learns(tmp_path):
    base = tiny_fox()
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model, tokens = lora(base), random_tokens(2, 12)
    adapted = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
               for name, _ in model.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    assert adapted == linear and any(name.endswith("fgate_proj") for name in adapted)
    losses = train(model.train(), tokens)
    assert losses[-1] < 0.5 * losses[0]

    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_fox(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens, use_cache=False).logits, logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens, use_cache=False).logits, logits, rtol=0, atol=2e-4)
    assert type(merged).__name__ == "FoxForCausalLM"
    assert merged.state_dict().keys() == before.keys()
    # Without the adapter the model is as it was.
    for name, weight in model.unload().state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_transformers_itself_loads_the_adapter(tmp_path):
    model, tokens = lora(tiny_fox()), random_tokens(2, 12)
    train(model.train(), tokens, steps=3)
    model.eval().save_pretrained(tmp_path)
    plain = tiny_fox()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert (plain(tokens, use_cache=False).logits - expected).abs().max() > 1e-2
        plain.load_adapter(str(tmp_path))
        assert torch.equal(plain(tokens, use_cache=False).logits, expected)


def test_an_adapted_model_generates_with_gradient_checkpointing_before():
    model, tokens = lora(tiny_fox()), random_tokens(1, 8)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    losses = train(model.train(), tokens, steps=12)
    assert losses[-1] < losses[0]
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        out = model.eval().generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
        by_hand = tokens
        for _ in range(4):
            by_hand = torch.cat([by_hand, model(input_ids=by_hand, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, by_hand)


def test_prefix_tuning_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="must hold forget gates"):
        peft.get_peft_model(tiny_fox(), config)(input_ids=random_tokens(1, 5))


@torch.no_grad()
def test_an_evicting_cache_and_its_fused_step_see_adapters_come_and_be_merged():
    model, token = tiny_fox().eval(), random_tokens(1, 1)

    def prompt(model):
        cache = FoxEvictingCache(model.config)
        model(input_ids=random_tokens(1, 9), past_key_values=cache, use_cache=True)
        return cache

    step, cache = FusedStep(model, "plain"), prompt(model)
    step(token, cache)
    adapted = lora(model, init_lora_weights=False)
    with pytest.raises(ValueError, match="`past_key_values` must be computed with the present weights"):
        adapted(input_ids=token, past_key_values=cache)
    with pytest.raises(ValueError, match="`model` must be a FoxForCausalLM; got a Peft.*, and merge adapters into it"):
        FusedStep(adapted, "plain")
    # The same modules come back and PEFT adds to `.data`, which no version counts.
    assert adapted.merge_and_unload() is model
    cache = prompt(model)
    with pytest.raises(
        ValueError, match="`model` must keep its weights under a step that was made of it; they changed"
    ):
        step(token, cache)
    merged = FusedStep(model, "plain")(token, cache)
    expected = model(torch.cat((random_tokens(1, 9), token), dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
