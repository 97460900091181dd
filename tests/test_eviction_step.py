"""Fused decoding steps over the cache that forgets: the logits of the model itself, whatever it is made of."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from helpers import random_tokens, tiny_fox
from modeling_fox import FoxEvictingCache, FoxModel, FusedStep, GraphedStep
from modeling_fox.graphed_fox import READ_BY_A_STEP

PROMPT, LENGTH = 150, 170
NO_GATES = {"fgate_type": "none", "fgate_decay_time_min": None, "fgate_decay_time_max": None}


@torch.no_grad()
def forgetful(**config):
    """Every weight is drawn, the norms' and the gates' as well: one that was left out would show."""
    times = {"fgate_decay_time_min": 1.5, "fgate_decay_time_max": 6.0}
    model = tiny_fox(**({"hidden_size": 32, "intermediate_size": 32} | times | config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or "norm" in name:
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


@torch.no_grad()
def both(model, make_step, batch=2, steps=LENGTH - PROMPT):
    """Logits of the model and of the step, `(B, T, V)` each, and their caches."""
    tokens, caches = random_tokens(batch, PROMPT + steps).to(model.device), []
    mask = torch.ones(batch, PROMPT, dtype=torch.int64, device=model.device)
    mask[-1, :7] = 0
    for _ in range(2):
        caches.append(FoxEvictingCache(model.config, page_size=16))
        model(tokens[:, :PROMPT], attention_mask=mask, past_key_values=caches[-1], use_cache=True)
    step, pieces = make_step(model, caches[1]), ([], [])
    for token in tokens[:, PROMPT:].split(1, dim=1):
        pieces[0].append(model(token, past_key_values=caches[0], use_cache=True).logits)
        pieces[1].append(step(token).clone())
    return *(torch.cat(x, dim=1) for x in pieces), *caches


def fused(model, cache, how="plain"):
    step = FusedStep(model, how)
    return lambda ids: step(ids, cache)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 1},
        {"use_output_gate": False, "use_output_norm": False, "use_k_shift": False, "qk_norm_shared": True},
        {"fgate_type": "bias_only", "use_v_shift": False, "tie_word_embeddings": True},
        NO_GATES | {"use_multi_skip": True},
    ],
    ids=["pro", "grouped", "parts-left-out", "bias-only", "no-gates-multi-skip"],
)
def test_a_fused_step_gives_the_logits_of_the_model(config):
    expected, got, plain, used = both(forgetful(**config), fused)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert torch.equal(plain.report().live_keys, used.report().live_keys) and used.get_seq_length() == LENGTH
    assert config.get("fgate_type") == "none" or int(used.report().live_keys.min()) < LENGTH


def test_it_is_one_graph_for_the_compiler(monkeypatch):
    """And compiled once: neither the number of keys nor the sizes of the pool are a part of it."""
    counted = []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=lambda graph, _: counted.append(1) or graph))
    expected, got, *_ = both(forgetful(), partial(fused, how="compiled"))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert len(counted) == 1


def test_half_precision_is_as_far_from_float32_as_the_model():
    model = forgetful().bfloat16()
    expected, got, *_ = both(model, fused)
    exact, *_ = both(model.float(), fused)
    error = [float((x.float() - exact).square().mean().sqrt()) for x in (got, expected)]
    assert 0 < error[0] < 1.2 * error[1]


def taught(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(random_tokens(1, 9), labels=random_tokens(1, 9), use_cache=False).loss.backward()
    optimizer.step()


def loaded(model, assign=False):
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=assign)


def adapted(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj, torch.nn.Linear(32, 32))


def merged(model):
    model.model.layers[1].self_attn.k_proj.weight.data += 0.1


def given_memory(model):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data + 0.1


WAYS = [taught, loaded, partial(loaded, assign=True), adapted, torch.nn.Module.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize("change", WAYS, ids=["optimizer", "load", "assign", "adapter", "cast"])
def test_a_step_does_not_outlive_the_weights_it_was_made_of(change):
    model, token = forgetful(), random_tokens(1, 1)
    step, cache = FusedStep(model, "plain"), FoxEvictingCache(model.config)
    model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
    step(token, cache)
    change(model)
    with pytest.raises(ValueError, match="`model` must keep its weights under a step that was made of it; they chang"):
        step(token, cache)


@torch.no_grad()
@pytest.mark.parametrize("merged", [merged, given_memory])
def test_merged_adapters_show_at_the_next_prompt(merged):
    """They are added to `.data`, or take its place, which no version counts."""
    model, token = forgetful(), random_tokens(1, 1)
    step, caches = FusedStep(model, "plain"), [FoxEvictingCache(model.config) for _ in range(2)]
    for cache in caches:
        model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
        if cache is caches[0]:
            step(token, cache)
            merged(model)
    with pytest.raises(ValueError, match="`model` must keep its weights under a step that was made of it; they chang"):
        step(token, caches[1])
    assert FusedStep(model, "plain")(token, caches[1]).shape == (1, 1, model.config.vocab_size)


@torch.no_grad()
def test_says_what_a_fused_step_cannot_do():
    with pytest.raises(ValueError, match=r"`model` must be on one device, without RoPE, .* use_rope=True. Call the"):
        FusedStep(forgetful(use_rope=True))
    with pytest.raises(ValueError, match="`model` must be a FoxForCausalLM; got a FoxModel. Take the language model"):
        FusedStep(forgetful(model_class=FoxModel))
    with pytest.raises(ValueError, match=r"`model` must be on one device, without RoPE, .*; got \['meta'\], use_rope"):
        FusedStep(forgetful().to("meta"))
    model, token = forgetful(), random_tokens(1, 1)
    step, cache = FusedStep(model, "plain"), FoxEvictingCache(model.config)
    with pytest.raises(ValueError, match="`cache` must hold a prompt .*; got 0 tokens on 0 devices, logit_bound=None"):
        step(token, cache)
    with pytest.raises(
        ValueError, match="`model` must be on one CUDA device, without RoPE, for a CUDA graph; got cpu"
    ):
        GraphedStep(step, cache)
    model(random_tokens(1, 5), past_key_values=cache, use_cache=True)
    assert step(token, cache).shape == (1, 1, model.config.vocab_size)
    with pytest.raises(ValueError, match=r"`input_ids` must be \(1, 1\), one token for each .*; got \(1, 2\). Feed"):
        step(random_tokens(1, 2), cache)
    with pytest.raises(ValueError, match=r"`input_ids` must be \(1, 1\), one token for each .*; got \(3, 1\). Feed"):
        step(random_tokens(3, 1), cache)
    with pytest.raises(ValueError, match="they were updated since, or are those of another model"):
        FusedStep(forgetful(), "plain")(token, cache)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="`cache` must hold a prompt .* not be for assisted decoding; .* recording=T"):
        step(token, cache)
    with pytest.raises(ValueError, match="`how` must be one of .*; got 'fast'. Take the first."):
        FusedStep(model, "fast")
    adapted(model)
    with pytest.raises(ValueError, match="`model` must have plain linear layers for a fused step; got a .*Merge ad"):
        FusedStep(model)
    model.model.layers[0].self_attn.fgate_proj.half()
    with pytest.raises(
        ValueError, match="`model` must be of one dtype for a fused step; got .'torch.float16', 'torch.f"
    ):
        FusedStep(model)


class ReplayedOnACPU:
    """Stands for a CUDA graph: a replay does what was recorded, and fails where a graph would read other memory."""

    recordings = 0

    def addresses(self):
        (store,) = self.step.cache.pages.stores.values()
        tensors = [getattr(store, name) for name in READ_BY_A_STEP]
        tensors += [x for layer in self.step.cache.layers for x in (layer.shift_keys, layer.shift_values)]
        return store, [None if x is None else (x.data_ptr(), x.shape) for x in tensors]

    def record(self, step, run):
        ReplayedOnACPU.recordings += 1
        self.step, self.run = step, run
        self.store, self.recorded = self.addresses()
        self.logits = torch.empty(self.store.batch, 1, step.model.config.vocab_size)
        return self.logits

    def replay(self):
        store, now = self.addresses()
        assert store is self.store and now == self.recorded
        lengths = list(store.num_keys)
        self.logits.copy_(self.run(self.step))
        store.num_keys = lengths  # a replay tells Python nothing


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """`GraphedStep` on a CPU."""
    recording, run = [], GraphedStep._step

    @contextmanager
    def graph(made):
        recording.append(made)
        yield
        recording.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", ReplayedOnACPU)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(GraphedStep, "_step", lambda self: recording[0].record(self, run) if recording else run(self))
    monkeypatch.setattr(ReplayedOnACPU, "recordings", 0)


def graphed(model, cache):
    step = FusedStep(model, "plain")
    if step.device.type == "cpu":
        step.device = torch.device("cuda")
    return GraphedStep(step, cache)


def rewound(model, caches):
    for cache in caches:
        cache.reset()
        model(random_tokens(2, 40).to(model.device), past_key_values=cache, use_cache=True)


def read_on(model, caches):
    for cache in caches:
        model(random_tokens(2, 150).to(model.device), past_key_values=cache, use_cache=True)


# What happens to a cache between steps, and the sequences that it then has.
BETWEEN = {
    "reordered": (lambda _, caches: [x.reorder_cache(torch.tensor([1, 0])) for x in caches], 2),
    "repeated": (lambda _, caches: [x.batch_repeat_interleave(2) for x in caches], 4),
    "selected": (lambda _, caches: [x.batch_select_indices(torch.tensor([3, 0])) for x in caches], 2),
    "started-over": (lambda _, caches: [x.start_over(torch.tensor([True, False])) for x in caches], 2),
    "read-on": (read_on, 2),
    "filled-anew": (rewound, 2),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_graph_is_recorded_anew_where_the_cache_has_moved(device, graphs_on_a_cpu, monkeypatch):
    """Two caches take turns with one `FusedStep`; 64 steps let the pool and the tables grow as well."""
    if device == "cuda":
        monkeypatch.undo()
    model = forgetful(fgate_decay_time_max=200.0, num_hidden_layers=1).to(device)
    expected, got = ([FoxEvictingCache(model.config, page_size=16) for _ in range(2)] for _ in range(2))
    for i, cache in enumerate((*expected, *got)):
        model(random_tokens(2, 40 + 9 * (i % 2)).to(device), past_key_values=cache, use_cache=True)
    fused_step = graphed(model, got[0]).model
    steps, count = [GraphedStep(fused_step, cache) for cache in got], 0

    def compare(tokens):
        for plain, step in zip(expected, steps, strict=True):
            logits = model(tokens.to(device), past_key_values=plain, use_cache=True).logits
            torch.testing.assert_close(step(tokens.to(device)), logits, rtol=0, atol=2e-5 if device == "cpu" else 1e-3)
            assert step.cache.get_seq_length() == plain.get_seq_length()

    for tokens in random_tokens(2, 64).split(1, dim=1):
        compare(tokens)
    count = ReplayedOnACPU.recordings
    assert device == "cuda" or 2 <= count < 2 * 64 // 4
    for change, batch in BETWEEN.values():
        for caches in (expected, got):
            change(model, caches)
        for tokens in random_tokens(batch, 4).split(1, dim=1):
            compare(tokens)
        assert device == "cuda" or ReplayedOnACPU.recordings > count
        count = ReplayedOnACPU.recordings


@torch.no_grad()
def test_a_graph_refuses_what_it_would_not_see(graphs_on_a_cpu):
    model, token = forgetful(), random_tokens(2, 1)
    cache = FoxEvictingCache(model.config)
    model(random_tokens(2, 9), past_key_values=cache, use_cache=True)
    step = graphed(model, cache)
    for _ in range(3):
        step(token)
    with pytest.raises(ValueError, match=r"`input_ids` must be \(2, 1\), one token for each .*; got \(2, 3\). Feed"):
        step(random_tokens(2, 3))
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="`cache` must hold a prompt .* not be for assisted decoding; .* recording=T"):
        step(token)
    cache.reset()
    with pytest.raises(ValueError, match="`cache` must hold a prompt on one device, .*; got 0 tokens on 0 devices"):
        step(token)
    model.model.norm.weight.mul_(2.0)
    model(random_tokens(2, 9), past_key_values=(cache := FoxEvictingCache(model.config)), use_cache=True)
    step.cache = cache
    with pytest.raises(ValueError, match="`model` must keep its weights under a step that was made of it; they chang"):
        step(token)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("kind", ["eager", "compiled", "plain"])
def test_gpu_replayed_steps_give_the_logits_of_the_model(kind):
    def make(model, cache):
        return GraphedStep(model if kind == "eager" else FusedStep(model, kind), cache)

    model = forgetful(hidden_size=128, intermediate_size=128).cuda()
    expected, got, plain, used = both(model, make)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert used.get_seq_length() == LENGTH and torch.equal(plain.report().live_keys, used.report().live_keys)
