"""Networks of agents against published sizes, loop references, and properties that tell right from nearly right."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fox_rl.diagnostics import Recorder, dormant_fraction, feature_rank, gradient_norms
from fox_rl.networks import (
    READOUTS,
    ImpalaEncoder,
    MultiSkipMLP,
    NatureEncoder,
    SoftMoE,
    TokenReadout,
    expert_slots,
)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_encoders_have_the_published_shapes_and_sizes():
    pixels = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    nature, impala = NatureEncoder(), ImpalaEncoder()
    assert nature(pixels).shape == (2, 64, 7, 7)
    assert impala(pixels).shape == (2, 32, 11, 11)
    assert count(nature) == 77_984  # 4*8*8*32+32 + 32*4*4*64+64 + 64*3*3*64+64
    assert sum(p.numel() for p in impala.parameters() if p.ndim == 4) == 97_344  # 98k with the biases
    assert torch.equal(nature(pixels), nature(pixels.float() / 255))
    assert ImpalaEncoder(width=3)(pixels).shape == (2, 96, 11, 11)


@pytest.mark.parametrize(
    ("blocks", "width", "millions"),
    [
        (1, 512, 2.39), (1, 1536, 11.9), (1, 2560, 27.7),
        (3, 512, 3.45), (3, 1536, 21.35), (3, 2560, 53.93),
        (5, 512, 4.5), (5, 1536, 30.79), (5, 2560, 80.15),
    ],
)  # fmt: skip
def test_the_multi_skip_mlp_has_the_sizes_of_table_1(blocks, width, millions):
    """arXiv:2506.15544, table 1: parameters of the MLP behind the 3136 features of the Nature encoder."""
    with torch.device("meta"):
        for skip in ("multi", "none"):
            assert count(MultiSkipMLP(3136, width, width, blocks, skip=skip)) / 1e6 == pytest.approx(
                millions, rel=0.01
            )


def test_the_multi_skip_mlp_is_its_formula():
    net = MultiSkipMLP(6, 10, 4, blocks=2)
    x = torch.randn(3, 6)
    h0 = net.project[1](net.project[0](x))
    state = h0
    for block in net.blocks:
        _, w1, norm1, _, w2, norm2 = block
        state = state + norm2(w2(F.relu(norm1(w1(F.relu(state)))))) + h0
    torch.testing.assert_close(net(x), net.out[1](net.out[0](state)))
    assert all(float(m.bias.detach().abs().sum()) == 0 for m in net.modules() if isinstance(m, nn.Linear))
    square = net.blocks[0][1].weight
    torch.testing.assert_close(square @ square.T, 2.0 * torch.eye(10), rtol=1e-4, atol=1e-4)


def test_blocks_that_do_nothing_leave_the_input_n_plus_one_times():
    net = MultiSkipMLP(6, 10, 4, blocks=7, norm=False)
    with torch.no_grad():
        for block in net.blocks:
            block[4].weight.zero_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(net(x), net.out(8 * net.project(x)))


def input_gradient(skip, blocks):
    """Norm of d y / d x with the initialization of `nn.Linear`, too small for relu by a factor 0.4 a layer."""
    torch.manual_seed(0)
    net = MultiSkipMLP(64, 64, 10, blocks, skip=skip, norm=False)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    x = torch.randn(32, 64, requires_grad=True)
    net(x).sum().backward()
    return float(x.grad.norm())


def test_the_gradient_comes_through_ten_blocks_only_with_skips():
    assert input_gradient("multi", 10) > input_gradient("multi", 1)
    assert input_gradient("none", 10) < 1e-4 * input_gradient("none", 1)


def test_soft_moe_is_the_loop_over_slots():
    moe, tokens = SoftMoE(dim=5, hidden=7, num_experts=3, slots_per_expert=2), torch.randn(2, 4, 5)
    dispatch, combine = moe.weights(tokens)
    torch.testing.assert_close(dispatch.sum(dim=1), torch.ones(2, 6))
    torch.testing.assert_close(combine.sum(dim=2), torch.ones(2, 4))
    expected = torch.zeros(2, 4, 5)
    for b in range(2):
        logits = tokens[b] @ moe.slot_embeddings
        for expert in range(3):
            for slot in (2 * expert, 2 * expert + 1):
                share = logits[:, slot].softmax(0)
                mixed = sum(share[t] * tokens[b, t] for t in range(4))
                out = F.relu(mixed @ moe.w1[expert] + moe.b1[expert, 0]) @ moe.w2[expert] + moe.b2[expert, 0]
                for t in range(4):
                    expected[b, t] += logits[t].softmax(0)[slot] * out
    torch.testing.assert_close(moe(tokens), expected, rtol=1e-5, atol=1e-5)


def test_soft_moe_does_not_mind_the_order_of_the_tokens():
    moe, tokens, order = SoftMoE(5, 7, 3, 2), torch.randn(2, 9, 5), torch.randperm(9)
    torch.testing.assert_close(moe(tokens[:, order]), moe(tokens)[:, order])


def test_soft_moe_leaks_the_future_so_it_must_not_stand_in_a_language_model():
    moe, tokens = SoftMoE(5, 7, 3, 2), torch.randn(1, 9, 5, requires_grad=True)
    moe(tokens)[0, 0].sum().backward()  # the output of the first token ...
    assert float(tokens.grad[0, 8].abs().max()) > 1e-4  # ... depends on the last


def test_soft_moe_starts_as_published():
    moe = SoftMoE(dim=400, hidden=300, num_experts=2, slots_per_expert=50)
    assert float(moe.slot_embeddings.detach().std()) == pytest.approx(400**-0.5, rel=0.02)  # LeCun normal
    assert float(moe.slot_embeddings.detach().abs().max()) <= 2 * 400**-0.5 / 0.8796
    bound = math.sqrt(6 / 700)  # Xavier uniform
    assert 0.99 * bound < float(moe.w1.detach().abs().max()) <= bound
    assert not moe.b1.any() and not moe.b2.any()


def test_slots_are_the_tokens_shared_out_over_the_experts():
    assert expert_slots(121, 4) == 31
    assert expert_slots(121, 1) == 121
    assert expert_slots(121, 4, capacity=0.1) == 4
    assert expert_slots(121, 200) == 1
    moe = TokenReadout((32, 11, 11), None, "soft_moe", num_experts=4).moe
    assert moe.slot_embeddings.shape == (32, 4 * 31)


def test_normalized_soft_moe_does_not_see_the_length_of_tokens():
    moe, tokens = SoftMoE(5, 7, 3, 2, normalize=True), torch.randn(2, 9, 5)
    for ours, scaled in zip(moe.weights(tokens), moe.weights(tokens * 3), strict=True):
        torch.testing.assert_close(ours, scaled)


def test_readouts_have_the_sizes_of_their_formulas():
    sizes = {mode: count(TokenReadout((32, 11, 11), 512, mode)) for mode in READOUTS if mode != "soft_moe"}
    assert sizes == {
        "flatten": 3872 * 512 + 512,
        "gap": 32 * 512 + 512,
        "per_conv_sum": 32 * 512 + 512,
        "per_conv_mean": 32 * 512 + 512,
    }
    moe = TokenReadout((32, 11, 11), None, "soft_moe", num_experts=4)
    assert count(moe) == 32 * 124 + 4 * (32 * 512 + 512 + 512 * 32 + 32)
    assert moe.out_dim == 3872
    assert TokenReadout((32, 11, 11), 512, "gap", scale=4).out_dim == 2048


def test_the_readouts_are_what_they_say():
    encoded = torch.randn(2, 3, 4, 5)
    by_mode = {mode: TokenReadout((3, 4, 5), 6, mode) for mode in ("gap", "per_conv_sum", "per_conv_mean")}
    for readout in by_mode.values():
        readout.dense = by_mode["gap"].dense
    dense = by_mode["gap"].dense
    torch.testing.assert_close(by_mode["gap"](encoded), dense(encoded.mean((2, 3))))
    each = torch.stack([F.relu(dense(encoded[:, :, i, j])) for i in range(4) for j in range(5)])
    torch.testing.assert_close(by_mode["per_conv_sum"](encoded), each.sum(0))
    torch.testing.assert_close(by_mode["per_conv_mean"](encoded), each.mean(0))
    assert torch.equal(TokenReadout.tokens(encoded)[:, 7], encoded[:, :, 1, 2])


def test_dormant_units_are_counted_by_hand():
    activations = torch.tensor([[4.0, 0.0, 2.0, 0.1], [4.0, 0.0, 2.0, 0.1]])  # mean scores 4, 0, 2, 0.1; layer 1.525
    assert dormant_fraction(activations) == 0.25
    assert dormant_fraction(activations, threshold=0.1) == 0.5
    assert dormant_fraction(torch.zeros(3, 5)) == 1.0
    assert dormant_fraction(activations[:, :, None, None].expand(2, 4, 3, 3)) == 0.25


def test_feature_rank_is_the_number_of_directions():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    assert feature_rank(low, share=1 - 1e-5) == 3
    assert feature_rank(torch.eye(10)) == 10
    assert feature_rank(torch.diag(torch.tensor([98.0, 1.5, 0.5]))) == 2  # 98 and 99.5 of 100
    assert feature_rank(torch.zeros(4, 4)) == 0


def test_gradient_norms_are_those_of_the_weights_in_order():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    net[1](torch.full((1, 3), 2.0)).sum().backward()
    assert gradient_norms(net) == {"0.weight": 0.0, "1.weight": pytest.approx(12**0.5)}


def test_the_recorder_sees_every_relu_and_leaves_nothing_behind():
    net = MultiSkipMLP(6, 10, 4, blocks=2)
    with Recorder(net) as recorder:
        net(torch.randn(3, 6))
    assert list(recorder.outputs) == ["blocks.0.0", "blocks.0.3", "blocks.1.0", "blocks.1.3"]
    assert set(recorder.dormant()) == set(recorder.outputs)
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(ValueError, match="choose must pick a module; got none"), Recorder(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenReadout((3, 4, 5), 6, "attention"), "mode must be one of flatten, .*; got 'attention'"),
        (lambda: TokenReadout((3, 4, 5), 6, "soft_moe"), "out_dim must be None for soft_moe"),
        (lambda: TokenReadout((3, 4, 5), 6)(torch.zeros(1, 3, 5, 4)), r"encoded must be .*; got \(1, 3, 5, 4\)"),
        (lambda: MultiSkipMLP(3, 4, 5, 1, skip="dense"), "skip must be one of multi, residual, none; got 'dense'"),
        (lambda: SoftMoE(3, 4, 5, 0), "slots_per_expert must be at least 1; got 0"),
        (lambda: feature_rank(torch.zeros(3)), r"features must be \(B, D\); got \(3,\)"),
        (lambda: dormant_fraction(torch.zeros(3)), r"activations must be \(B, units\)"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
