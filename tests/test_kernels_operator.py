"""The public operator on CPU tensors: against the dense definition, PyTorch's attention and hand-worked numbers."""

import math

import pytest
import torch

from fox_kernels import forgetting_attention, forgetting_attention_reference
from helpers import assert_as_accurate_as_torch, attention_inputs, output_and_gradients

NAMES = ("output", "dq", "dk", "dv", "dlog_fgate")

SHAPES = [
    pytest.param(dict(queries=5), id="shorter-than-a-block"),
    pytest.param(dict(queries=129, dim=16), id="one-past-a-block"),
    pytest.param(dict(queries=1, keys=77), id="decode-one-token"),
    pytest.param(dict(queries=70, keys=333), id="chunked-prefill"),
    pytest.param(dict(queries=257, heads=6, kv_heads=2), id="grouped-query"),
    pytest.param(dict(queries=150, heads=4, kv_heads=1, dim=40), id="multi-query-odd-width"),
    pytest.param(dict(queries=100, batch=3, dim=256), id="widest-head"),
    pytest.param(dict(queries=300, gate_logits=(-20.0, 20.0)), id="extreme-gates"),
    pytest.param(dict(queries=300, gate_logits=(20.0, 20.0)), id="open-gates"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_match_the_definition(shape, dtype, poisoned_memory):
    inputs = attention_inputs(**shape, dtype=dtype)
    key_start = torch.arange(inputs[0].shape[0]) * 3
    # Rounded before it is given to all three: it is an input, and its rounding nobody's error.
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    exact = output_and_gradients(
        forgetting_attention_reference, [x.double() for x in inputs], grad_out.double(), key_start=key_start
    )
    torch_same = output_and_gradients(forgetting_attention_reference, inputs, grad_out, key_start=key_start)
    got = output_and_gradients(forgetting_attention, inputs, grad_out, key_start=key_start)
    for name, x, same, truth in zip(NAMES, got, torch_same, exact, strict=True):
        assert_as_accurate_as_torch(x, same, truth, name=name)


def test_hand_worked_numbers():
    # Two positions, q = 0: the weights are the softmax of the decays alone, (log f_1, 0).
    q = torch.zeros(1, 1, 2, 1)
    v = torch.tensor([[[[3.0], [7.0]]]])
    log_fgate = torch.log(torch.tensor([[[0.9, 0.5]]]))
    for function in (forgetting_attention, forgetting_attention_reference):
        out = function(q, q, v, log_fgate)
        torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([3.0, (0.5 * 3.0 + 7.0) / 1.5]))


def test_open_gates_give_ordinary_causal_attention():
    q, k, v, log_fgate = attention_inputs(queries=200, dim=64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(forgetting_attention(q, k, v, torch.zeros_like(log_fgate)), expected, atol=2e-6, rtol=0)


def test_the_scale_reaches_the_scores():
    inputs = attention_inputs(queries=64)
    expected = forgetting_attention_reference(*(x.double() for x in inputs), scale=0.9)
    torch.testing.assert_close(forgetting_attention(*inputs, scale=0.9).double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("closed", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_closed_gate_starts_a_new_document(closed):
    """Exactly: the later document's output and gradients are those of running it alone."""
    inputs = attention_inputs(queries=300, dim=32)
    inputs[3][:, :, 170] = closed
    grad_out = torch.randn(inputs[0].shape)
    whole = output_and_gradients(forgetting_attention, inputs, grad_out)
    for part in (slice(0, 170), slice(170, 300)):
        alone = output_and_gradients(
            forgetting_attention, [x[:, :, part].contiguous() for x in inputs], grad_out[:, :, part]
        )
        for name, x, y in zip(NAMES, whole, alone, strict=True):
            torch.testing.assert_close(
                x[:, :, part], y, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert (whole[4][:, :, 170] == 0).all()


def test_padding_changes_nothing_and_may_hold_anything():
    inputs = attention_inputs(queries=90, dim=32, batch=1)
    padded = [torch.nn.functional.pad(x, (0, 0, 40, 0) if x.dim() == 4 else (40, 0)) for x in inputs]
    for x in padded[1:3]:
        x[:, :, :40] = 1e4
    got = forgetting_attention(*padded, key_start=torch.tensor([40]))
    torch.testing.assert_close(got[:, :, 40:], forgetting_attention(*inputs), atol=2e-6, rtol=0)
    assert (got[:, :, :40] == 0).all()


def test_the_first_gate_has_no_gradient():
    """It is part of every running sum alike and leaves the softmax: a check of the summed row and column terms."""
    inputs = attention_inputs(queries=700, batch=1)
    gradient = output_and_gradients(forgetting_attention, inputs, torch.randn(inputs[0].shape))[4]
    assert float(gradient[:, :, 0].abs().max()) < 1e-5 * float(gradient.abs().max())


def test_gates_stay_exact_far_from_the_start():
    """At lam = -7e4 a float32 running sum is off by 8e-3 nats; the output must not depend on the distance."""
    q, k, v, log_fgate = attention_inputs(batch=1, heads=1, queries=64, keys=64)
    far = 100_000
    stretch = torch.full((1, 1, far), -0.7)
    long = forgetting_attention(
        q,
        torch.cat((torch.zeros(1, 1, far, 32), k), 2),
        torch.cat((torch.zeros(1, 1, far, 32), v), 2),
        torch.cat((stretch, log_fgate), -1),
        key_start=torch.tensor([far]),
    )
    torch.testing.assert_close(long, forgetting_attention(q, k, v, log_fgate), atol=2e-6, rtol=0)


def test_strided_inputs_are_read_in_place_and_keep_their_order():
    fused = torch.randn(2, 50, 3, 4, 32)  # one projection for q, k, v in (batch, length, heads, dim) order
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    log_fgate = torch.nn.functional.logsigmoid(torch.randn(2, 50, 4)).transpose(1, 2)
    got = forgetting_attention(q, k, v, log_fgate)
    expected = forgetting_attention_reference(*(x.contiguous() for x in (q, k, v, log_fgate)))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    assert got.transpose(1, 2).is_contiguous()


def test_autocast_casts_the_products_and_never_the_gates():
    inputs = attention_inputs(queries=40)
    with torch.autocast("cpu", torch.bfloat16):
        got = forgetting_attention(*inputs)
    expected = forgetting_attention(*(x.bfloat16() for x in inputs[:3]), inputs[3])
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)


@pytest.mark.parametrize("tolerance", [None, -10.0])
def test_the_custom_op_keeps_pytorchs_contract(tolerance):
    q, k, v, log_fgate = attention_inputs(queries=20, batch=1, heads=2, dim=16)
    arguments = [x.requires_grad_() for x in (q, k, v, log_fgate)]
    arguments += [0.25, tolerance, "paper", None, torch.tensor([2])]
    torch.library.opcheck(torch.ops.fox_kernels.forgetting_attention.default, arguments)


@pytest.mark.parametrize("tolerance", [None, -10.0])
def test_compiles_into_one_graph(tolerance):
    inputs = [x.requires_grad_() for x in attention_inputs(queries=150, batch=1, heads=2, gate_logits=(-2.0, 4.0))]

    def function(*args):
        return forgetting_attention(*args, log_pruning_tolerance=tolerance).square().sum()

    expected = torch.autograd.grad(function(*inputs), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 4, 32)), "q must have 4 dimensions"),
        (
            dict(q=torch.zeros(2, 4, 9, 8, dtype=torch.int64)),
            "q must be float32, float16 or bfloat16; got torch.int64",
        ),
        (dict(k=torch.zeros(2, 4, 9, 8, dtype=torch.float16)), "k must have the dtype of q"),
        (dict(k=torch.zeros(2, 3, 9, 8)), r"k must be \(2, H_kv, S, 8\) with H_kv dividing 4; got \(2, 3, 9, 8\)"),
        (dict(v=torch.zeros(2, 4, 9, 16)), "v must have the shape of k"),
        (dict(k=torch.zeros(2, 4, 5, 8), v=torch.zeros(2, 4, 5, 8)), "q has 9 positions but k only 5"),
        (dict(log_fgate=torch.zeros(2, 1, 9)), r"log_fgate must be \(2, 4, 9\), one gate per query head"),
        (dict(log_fgate=torch.zeros(2, 4, 9, dtype=torch.float16)), "log_fgate must be float32, got torch.float16"),
        (dict(key_start=torch.zeros(3, dtype=torch.int64)), r"key_start must be \(2,\) int32 or int64"),
        (
            dict(key_start=torch.zeros(2, dtype=torch.int64, device="meta")),
            "key_start must be on the device of q, cpu",
        ),
        (
            dict(log_pruning_tolerance=0.5),
            "log_pruning_tolerance is the log of a probability and must be negative; got 0.5",
        ),
        (dict(log_pruning_tolerance=math.nan), "must be negative; got nan"),
        (dict(pruning_rule="greedy"), "pruning_rule must be one of"),
        (dict(logit_bound=-1.0), "logit_bound must be at least 0"),
        (dict(logit_bound=torch.zeros(3)), r"logit_bound must be a float, \(4,\) or \(2, 4\); got shape \(3,\)"),
        (dict(q=torch.zeros(2, 4, 9, 300), k=torch.zeros(2, 4, 9, 300)), "head_dim must be at most 256; got 300"),
        (dict(q=torch.zeros(2, 4, 0, 8)), "must not be empty"),
    ],
)
def test_says_what_is_wrong_with_the_input(change, message):
    arguments = dict(
        q=torch.zeros(2, 4, 9, 8), k=torch.zeros(2, 4, 9, 8), v=torch.zeros(2, 4, 9, 8), log_fgate=torch.zeros(2, 4, 9)
    )
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        forgetting_attention(
            arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), arguments.pop("log_fgate"), **arguments
        )
