"""The four attention backends compute the same function, and every other one is refused."""

import re
import warnings
from functools import partial

import pytest
import torch

import modeling_fox.attention_fox as attention_fox
from fox_kernels import forgetting_attention_reference
from helpers import assert_as_accurate_as_torch, attention_inputs, random_tokens, tiny_fox
from modeling_fox import FoxConfig, FoxForCausalLM, FoxModel, forget_gates, pruning_stats

FOLDED = ["sdpa", "fox_acp"]  # linear in memory and differentiable on a CPU
FUNCTIONS = {
    "eager": attention_fox.eager_attention_forward,
    "sdpa": attention_fox.sdpa_attention_forward,
    "flex_attention": attention_fox.flex_attention_forward,
    "fox_acp": attention_fox.fox_acp_attention_forward,
}


def run_logits(model, backend, tokens, **inputs):
    model.set_attn_implementation(backend)
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def run_attention(backend, q, k, v, log_fgate):
    """Output `(B, H, T, D)` of a backend on bare tensors, causal, without padding."""
    module = torch.nn.Module().eval()
    module.config = FoxConfig()
    mask = None
    length = q.shape[2]
    if backend == "eager":
        mask = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    elif backend == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    scale = q.shape[-1] ** -0.5
    return FUNCTIONS[backend](module, q, k, v, mask, scaling=scale, log_fgate=log_fgate)[0].transpose(1, 2)


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention without its compiler, which takes a minute a shape on a CPU."""
    import transformers.masking_utils
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def plain(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "called without torch.compile"
            return flex_attention(*args, **kwargs)

    attend = attention_fox.flex_attention_of_cpus
    monkeypatch.setattr(attention_fox, "flex_attention_of_cpus", lambda: plain)
    mask = lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", mask)
    return attend


@pytest.mark.parametrize("backend", FUNCTIONS)
def test_gates_weigh_the_past_as_worked_out_by_hand(backend, uncompiled_flex):
    # All scores q.k are 0, so the weights are the products of the gates after each key, over their sum:
    # token 2 sees token 0 through 1/2 * 1/4 = 1/8, token 1 through 1/4, itself through 1. Token 0's gate is not used.
    q = torch.zeros(1, 1, 3, 16)
    v = torch.tensor([11.0, 22.0, 44.0])[None, None, :, None].expand(1, 1, 3, 16).contiguous()
    log_fgate = torch.tensor([0.9, 0.5, 0.25]).log()[None, None]
    out = run_attention(backend, q, q, v, log_fgate)
    expected = [11.0, (0.5 * 11 + 22) / 1.5, (11 / 8 + 22 / 4 + 44) / 1.375]
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize("backend", ["eager", *FOLDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_as_accurate_as_plain_attention_in_every_dtype(backend, dtype):
    # Gates at logit -6 forget 6 nats a token: the sum over the sequence is 1,200, far beyond what 8 bits resolve.
    q, k, v, log_fgate = attention_inputs(queries=200, kv_heads=2, gate_logits=(-6.0, 4.0), dtype=dtype)
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), log_fgate.double())
    same_dtype = forgetting_attention_reference(q, k, v, log_fgate)
    floor = 1e-4 if dtype == torch.float32 else 2e-3
    assert_as_accurate_as_torch(run_attention(backend, q, k, v, log_fgate), same_dtype, exact, floor=floor)


def test_fp16_carries_decays_that_fp16_cannot_hold():
    # 20 nats a token: the running sum reaches 8,000 nats, times sqrt(64) more than the largest fp16 number.
    q, k, v, _ = attention_inputs(queries=400, dim=64, dtype=torch.float16)
    log_fgate = torch.full((2, 4, 400), -20.0)
    log_fgate[..., ::2] = -0.01
    exact = forgetting_attention_reference(q.double(), k.double(), v.double(), log_fgate.double())
    same_dtype = forgetting_attention_reference(q, k, v, log_fgate)
    assert_as_accurate_as_torch(run_attention("sdpa", q, k, v, log_fgate), same_dtype, exact, floor=2e-3)


def tensor_core_product(rows, columns):
    """`rows @ columns.mT` in fp32 as PyTorch's attention kernels have it from a GPU's tensor cores.

    Every number is cut into a large and a small part of 11 bits, and of their four products the smallest is left out.
    8 channels are one step of the sum: their products and the sum so far are cut off at 2^-26 of the largest of them,
    added, and cut to fp32. With this in place of PyTorch's kernel tiny_fox is 2.3e-4 off at 300 tokens in the layout
    for CPUs, where an H100 was 2.4e-4 off.
    """

    def cut(x, bits):
        unit = torch.ldexp(torch.ones((), dtype=torch.float64), (torch.frexp(x).exponent - bits).double())
        return (x / unit).trunc() * unit

    pair = (rows, columns)
    large = [cut(x.double(), 11) for x in pair]
    small = [attention_fox.round_to_tf32((x - y).float()).double() for x, y in zip(pair, large, strict=True)]
    total = torch.zeros(*rows.shape[:-1], columns.shape[-2], dtype=torch.float64)
    for start in range(0, rows.shape[-1], 8):
        step = slice(start, start + 8)
        for left, right in ((small[0], large[1]), (large[0], small[1]), (large[0], large[1])):
            terms = left[..., :, None, step] * right[..., None, :, step]
            terms = torch.cat((terms, total[..., None]), dim=-1)
            unit = torch.ldexp(torch.ones(()).double(), (torch.frexp(terms.abs().amax(-1)).exponent - 26).double())
            total = cut(((terms / unit[..., None]).trunc() * unit[..., None]).sum(dim=-1), 24)
    return total


@pytest.mark.parametrize("length", [300, 1000, 4000])
@pytest.mark.parametrize("gates", ["bias-spread", "strong"])
def test_fp32_scores_survive_tensor_cores(gates, length):
    q, k, v, log_fgate = attention_inputs(batch=1, queries=8, keys=length, gate_logits=(-6.0, 4.0))
    if gates == "bias-spread":  # heads that keep 1, 21, 464 and 10,000 tokens
        log_fgate = torch.empty_like(log_fgate).exponential_() * -torch.logspace(0, -4, 4)[None, :, None]
    scale = q.shape[-1] ** -0.5
    running = attention_fox.running_sum(log_fgate, None)
    decay = running[..., -8:, None] - running[..., None, :]
    exact = q.double() @ k.double().mT * scale + decay
    plain = tensor_core_product(q, k) * scale + decay

    def weights(scores):
        return scores.masked_fill(decay > 0, -torch.inf).softmax(dim=-1)

    def check(tensor_cores):
        rows, columns = attention_fox.fold_decay_fp32(q, k, running, scale, tensor_cores)
        folded = tensor_core_product(rows, columns) * scale
        # Twice the error that the cores make without any decay.
        assert_as_accurate_as_torch(weights(folded), weights(plain), weights(exact), floor=1e-6)

    check(tensor_cores=True)
    with pytest.raises(AssertionError, match="max error"):
        check(tensor_cores=False)


@pytest.mark.parametrize("variant", ["pro", "llama", "pro-rope"])
@pytest.mark.parametrize("backend", FOLDED)
def test_whole_model_equals_the_definition(variant, backend):
    settings = {"pro": {}, "pro-rope": {"use_rope": True}}.get(variant)
    model = tiny_fox(**FoxConfig.llama().to_diff_dict() | SMALL if settings is None else settings)
    tokens = random_tokens(2, 150)
    difference = run_logits(model, backend, tokens) - run_logits(model, "eager", tokens)
    assert difference.abs().max() < 1e-4


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": None,
    "vocab_size": 97,
    "initializer_range": 0.1,
}


def test_flex_attention_equals_the_definition_also_with_padding_and_documents(uncompiled_flex):
    model, tokens = tiny_fox(), random_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    positions = (torch.arange(40) % 25).expand(2, -1)
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": positions}):
        got, expected = (
            run_logits(model, "flex_attention", tokens, **inputs),
            run_logits(model, "eager", tokens, **inputs),
        )
        real = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask).bool()
        assert (got - expected)[real].abs().max() < 1e-4


@torch.no_grad()
def test_flex_attention_takes_a_second_length_on_a_cpu(monkeypatch, uncompiled_flex):
    """The code for lengths that are not known does not compile (PyTorch 2.13), so none may be asked for."""
    graphs, compiler = [], torch.compile

    def look(graph, inputs):
        graphs.append([x for x in inputs if not isinstance(x, torch.Tensor) or isinstance(x.shape[-2], torch.SymInt)])
        return graph

    monkeypatch.setattr(torch, "compile", partial(compiler, backend=look))
    # As it is, but without the cache: what is compiled here is for this test alone.
    monkeypatch.setattr(attention_fox, "flex_attention_of_cpus", uncompiled_flex.__wrapped__)
    model = tiny_fox(num_hidden_layers=1)
    for length in (20, 40, 30):
        tokens = random_tokens(2, length)
        expected = run_logits(model, "eager", tokens)
        torch.testing.assert_close(run_logits(model, "flex_attention", tokens), expected, rtol=0, atol=1e-4)
    assert graphs == [[], [], []]


def test_pruning_changes_little_and_really_prunes():
    model, tokens = tiny_fox(log_pruning_tolerance=-10.0), random_tokens(1, 640)
    with pruning_stats_of(model) as stats:
        pruned = run_logits(model, "fox_acp", tokens)
    assert (pruned - run_logits(model, "eager", tokens)).abs().max() < 1e-3
    assert stats.pruned_fraction.shape == (2, 4)
    assert stats.pruned_fraction.min() > 0.3
    assert 0 < stats.lost_mass_bound.max() <= 4.54e-5


def pruning_stats_of(model):
    model.set_attn_implementation("fox_acp")
    return pruning_stats(model)


def assert_gradients_of_the_definition(backend):
    tokens = random_tokens(2, 70)
    gradients = {}
    for name in ("eager", backend):
        model = tiny_fox(attn_implementation=name).train()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, expected in gradients["eager"].items():
        torch.testing.assert_close(
            gradients[backend][key], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize("backend", FOLDED)
def test_gradients_equal_those_of_the_definition(backend):
    assert_gradients_of_the_definition(backend)


def test_layout_for_tensor_cores_computes_the_same_with_its_gradient(monkeypatch):
    fold, tokens = attention_fox.fold_decay_fp32, random_tokens(2, 150)
    expected = run_logits(tiny_fox(), "eager", tokens)
    monkeypatch.setattr(attention_fox, "fold_decay_fp32", lambda *args, tensor_cores: fold(*args, tensor_cores=True))
    assert (run_logits(tiny_fox(), "sdpa", tokens) - expected).abs().max() < 2e-5
    assert_gradients_of_the_definition("sdpa")


@pytest.mark.parametrize("backend", ["eager", *FOLDED])
def test_a_packed_document_is_as_if_alone(backend):
    model = tiny_fox()
    first, second, third = random_tokens(1, 30), random_tokens(1, 41, seed=2), random_tokens(1, 9, seed=3)
    packed = torch.cat([first, second, third], dim=1)
    positions = torch.cat([torch.arange(30), torch.arange(41), torch.arange(9)])[None]
    logits = run_logits(model, backend, packed, position_ids=positions)
    assert (logits[:, 30:71] - run_logits(model, backend, second)).abs().max() < 2e-5
    # What stands in the first document does not reach the others at all.
    changed = packed.clone()
    changed[:, :30] = random_tokens(1, 30, seed=4)
    again = run_logits(model, backend, changed, position_ids=positions)
    # To the bit, or, where the gates are summed across documents, but for the rounding of that sum.
    assert (again - logits)[:, 30:].abs().max() < (1e-5 if backend == "fox_acp" else 1e-30)
    assert (again - logits)[:, :30].abs().max() > 0.1
    # A mask of ones says nothing, and must not switch documents off.
    with_mask = run_logits(model, backend, packed, position_ids=positions, attention_mask=torch.ones_like(packed))
    assert torch.equal(with_mask, logits)


def test_packed_documents_with_a_cache_or_padding_are_refused():
    model, tokens = tiny_fox(), random_tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="`position_ids` must go on by one .* Pass `use_cache=False`"):
        model(tokens, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="`position_ids` must go on by one"):
        mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
        model(tokens, position_ids=positions, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("backend", ["eager", *FOLDED])
# Keys of padding have zero values and only scale the output down, which the output norm would undo.
@pytest.mark.parametrize(
    "settings", [{}, {"use_rope": True}, {"use_output_norm": False}], ids=["pro", "rope", "no-norm"]
)
@pytest.mark.parametrize("padded", [slice(0, 9), slice(31, 40), slice(12, 21)], ids=["left", "right", "middle"])
def test_padding_anywhere_changes_nothing(backend, settings, padded):
    model, alone = tiny_fox(**settings), random_tokens(1, 31)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, padded] = 0
    tokens = random_tokens(2, 40, seed=5)
    tokens[1, mask[1].bool()] = alone[0]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = run_logits(model, backend, tokens, attention_mask=mask, position_ids=positions)
    assert (logits[1, mask[1].bool()] - run_logits(model, backend, alone)[0]).abs().max() < 1e-4
    assert (logits[:1] - run_logits(model, backend, tokens[:1])).abs().max() < 1e-4


@pytest.mark.parametrize("backend", FOLDED)
def test_padding_that_computes_nan_stays_where_it_is(backend):
    model, tokens = tiny_fox(), random_tokens(1, 12)
    embeds = model.get_input_embeddings()(tokens).detach()
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    clean = run_logits(model, backend, None, inputs_embeds=embeds, attention_mask=mask)
    embeds[:, :4] = float("nan")
    spoiled = run_logits(model, backend, None, inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(spoiled[:, 4:], clean[:, 4:])


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "paged|sdpa", "someone/kernel", "sdpaa"])
def test_a_backend_that_would_drop_the_gates_is_refused(name):
    message = rf'`attn_implementation="{re.escape(name)}"` is not supported: it must be one of .*fox_acp'
    with pytest.raises(ValueError, match=message):
        tiny_fox(attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        tiny_fox().set_attn_implementation(name)


def test_fox_acp_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(attention_fox, "forgetting_attention", None)
    with pytest.raises(ImportError, match="pip install 'fox-transformers"):
        tiny_fox(attn_implementation="fox_acp")
    assert tiny_fox().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("has_gpu, backend", [(True, "fox_acp"), (False, "sdpa")])
def test_default_backend_is_the_pruning_one_where_there_is_a_gpu(monkeypatch, has_gpu, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert tiny_fox().config._attn_implementation == backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"qk_norm_shared": True}, {"use_rope": True}], ids=str)
def test_logit_bound_covers_the_largest_score_there_can_be(dtype, settings):
    model = tiny_fox(model_class=FoxModel, **settings).to(dtype)
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.q_norm.weight.normal_().mul_(3)
        attention.k_norm.weight.normal_().mul_(3)
    bound = attention.logit_bound(4, dtype)
    assert bound.shape == (4,) and bound.dtype == torch.float32 and not bound.requires_grad
    norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
    # Heads whose only channel is the one with the largest weight reach the bound, up to rounding.
    for head in range(4):
        lengths = []
        for weight, index, size in ((norms[0], head, 7.7), (norms[1], head // 2, 3.3)):
            weight = weight if weight.dim() == 1 else weight[index]
            states = torch.zeros(16, dtype=dtype)
            states[weight.abs().argmax()] = size
            lengths.append(float(torch.nn.functional.rms_norm(states, (16,), weight, 1e-5).double().norm()))
        assert 0.9 * float(bound[head]) < lengths[0] * lengths[1] * 16**-0.5 <= float(bound[head])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_logit_bound_covers_what_rounding_adds(dtype):
    attention = tiny_fox(model_class=FoxModel).to(dtype).layers[0].self_attn
    lengths = []
    for norm, num_heads in ((attention.q_norm, 4), (attention.k_norm, 2)):
        norm.weight.fill_(1.37)
        # Two values a head: some pairs round up in every channel.
        states = torch.rand(20_000, 1, num_heads, 2, dtype=torch.float64).repeat_interleave(8, dim=-1).to(dtype)
        lengths.append(norm(states).double().norm(dim=-1).max())
    largest = float(lengths[0] * lengths[1] * 16**-0.5)
    without_margin = float(attention.q_norm.weight.max().double() ** 2 * 4)
    assert without_margin < largest <= float(attention.logit_bound(4, dtype).min())


def test_logit_bound_is_measured_without_qk_norm():
    assert tiny_fox(use_qk_norm=False).model.layers[0].self_attn.logit_bound(4, torch.float32) is None


def test_pruning_stats_take_mean_and_maximum_over_calls():
    model = tiny_fox(log_pruning_tolerance=-10.0, attn_implementation="fox_acp")
    short, long = random_tokens(1, 300), random_tokens(1, 900)
    with torch.no_grad():
        with pruning_stats(model) as one:
            model(short, use_cache=False)
        with pruning_stats(model) as other:
            model(long, use_cache=False)
        with pruning_stats(model) as both:
            model(short, use_cache=False)
            model(long, use_cache=False)
    torch.testing.assert_close(both.pruned_fraction, (one.pruned_fraction + other.pruned_fraction) / 2)
    torch.testing.assert_close(both.lost_mass_bound, torch.maximum(one.lost_mass_bound, other.lost_mass_bound))
    assert model.model.layers[0].self_attn.pruning_sink is None


def test_pruning_stats_say_what_is_missing():
    model = tiny_fox(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="`attn_implementation` must be 'fox_acp' to prune; got 'sdpa'"):
        with pruning_stats(model):
            pass
    with pruning_stats_of(model) as stats:
        pass
    with pytest.raises(ValueError, match="must see a forward call"):
        stats.pruned_fraction  # noqa: B018
    with pytest.raises(ValueError, match="`model` must be a FoX model; got a Linear"):
        with forget_gates(torch.nn.Linear(2, 2)):
            pass


def test_forget_gates_are_those_of_the_gate_projection():
    model, tokens = tiny_fox(), random_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with torch.no_grad(), forget_gates(model) as gates:
        model(tokens, attention_mask=mask, use_cache=False)
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
        expected = torch.sigmoid(layer.self_attn.fgate_proj(hidden)).log().transpose(1, 2)
    expected[1, :, :2] = 0.0
    assert len(gates) == 2 and gates[0].dtype == torch.float32
    torch.testing.assert_close(gates[0], expected)


@pytest.mark.parametrize("backend", FOLDED)
def test_training_step_compiles_to_one_graph(backend):
    model = tiny_fox(attn_implementation=backend, log_pruning_tolerance=-10.0).train()
    tokens = random_tokens(2, 33)
    expected = model(tokens, labels=tokens, use_cache=False).loss
    # The tracer without a code generator: what is tested is that nothing in the model breaks the graph.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, labels=tokens, use_cache=False).loss, expected)


def test_autocast_gives_queries_keys_and_values_one_dtype():
    model, tokens = tiny_fox(attn_implementation="fox_acp").train(), random_tokens(2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    exact = model(tokens, labels=tokens, use_cache=False).loss
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()


def test_gradient_checkpointing_changes_nothing():
    tokens = random_tokens(2, 33)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_fox().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_labels_are_shifted_by_the_model_and_normalized_as_asked():
    model, tokens = tiny_fox(), random_tokens(2, 12)
    with torch.no_grad():
        out = model(tokens, labels=tokens, use_cache=False)
        halved = model(tokens, labels=tokens, use_cache=False, num_items_in_batch=44).loss
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(halved, expected / 2)


def test_only_the_logits_asked_for_are_computed():
    model, tokens = tiny_fox(), random_tokens(2, 12)
    with torch.no_grad():
        every = model(tokens).logits
        torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, every[:, -3:])
        torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])


def test_exactly_one_kind_of_input_is_needed():
    model, tokens = tiny_fox(), random_tokens(1, 3)
    for inputs in ({}, {"input_ids": tokens, "inputs_embeds": torch.zeros(1, 3, 64)}):
        with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds` must be given"):
            model(**inputs)


def test_half_precision_models_run_and_stay_close():
    tokens = random_tokens(1, 60)
    exact = run_logits(tiny_fox(), "eager", tokens)
    for dtype in (torch.bfloat16, torch.float16):
        model = FoxForCausalLM.from_pretrained(
            None, config=tiny_fox().config, state_dict=tiny_fox().state_dict(), dtype=dtype
        )
        for backend in FUNCTIONS:
            if backend != "flex_attention":
                error = (run_logits(model.eval(), backend, tokens).float() - exact).abs().mean()
                assert error < 0.05 * exact.abs().mean()
