"""What several test files share. The only place with a numerical tolerance for kernels."""

import os

import pytest
import torch

# A Triton kernel runs in the interpreter on a CPU, and on a GPU.
DEVICES = [
    pytest.param(
        "cpu",
        marks=[
            pytest.mark.interpret,
            pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1"),
        ],
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def assert_as_accurate_as_torch(got, torch_same_dtype, exact, *, factor=2.0, floor=1e-5, name="output"):
    """Fail if `got` is more than `factor` times further from `exact` than PyTorch is in the same dtype.

    The bound comes from the inputs, not from a table: if PyTorch itself is off by 3e-3 in bfloat16 on this shape, the
    kernel may be off by 6e-3, and on an easier shape it may not. `floor`, relative to the largest exact value, covers
    the case that PyTorch happens to be exact.
    """
    got, torch_same_dtype, exact = got.double(), torch_same_dtype.double(), exact.double()
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert not got.isnan().any(), f"{name}: holds {int(got.isnan().sum())} NaN"
    error = (got - exact).abs()
    own = float((torch_same_dtype - exact).abs().max())
    allowed = factor * own + floor * max(1.0, float(exact.abs().max()))
    worst = float(error.max())
    if worst > allowed:
        index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: max error {worst:.2e} > {allowed:.2e} allowed ({factor} x PyTorch's own error {own:.2e}), "
            f"at {index}: got {float(got[index]):.6f}, exact {float(exact[index]):.6f}"
        )


def attention_inputs(
    *, batch=2, heads=4, kv_heads=None, queries=96, keys=None, dim=32, gate_logits=(-3.0, 3.0), dtype=torch.float32,
    device="cpu", seed=0,
):  # fmt: skip
    """q, k, v ~ N(0, 1) in `dtype` and log gates = logsigmoid of uniform logits, `(B, H, S)` float32."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    q = torch.randn(batch, heads, queries, dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, keys, dim, generator=generator)
    low, high = gate_logits
    logits = torch.rand(batch, heads, keys, generator=generator) * (high - low) + low
    log_fgate = torch.nn.functional.logsigmoid(logits)
    return [x.to(device=device, dtype=dtype) for x in (q, k, v)] + [log_fgate.to(device)]


def output_and_gradients(function, inputs, grad_out, **options):
    """`function(*inputs, **options)` and its gradients with respect to every input, as one list."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def save_tiny_llama(folder, *, vocab_size=258, max_position_embeddings=64):
    """A random 2-layer Llama with the byte tokenizer, as `from_pretrained` loads it: a model that is not ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fox_training.tokenizers import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=max_position_embeddings, bos_token_id=256, eos_token_id=256,
        pad_token_id=257, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_fox(*, seed=0, model_class=None, attn_implementation=None, **config):
    """A random 2-layer FoX (Pro) with grouped queries in eval mode, weights large enough that every part matters."""
    from modeling_fox import FoxConfig, FoxForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = sizes | {"num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(seed)
    config = FoxConfig(**(defaults | config))
    config._attn_implementation = attn_implementation
    return (model_class or FoxForCausalLM)(config).eval()


def random_tokens(*shape, vocab_size=97, seed=1):
    """Token ids from 1 on (0 is padding in these tests), `shape` int64."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
