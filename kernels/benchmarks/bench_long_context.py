"""Long contexts: FoX with the cache that forgets, beside a Transformer of the same size with SDPA and a static cache.

    python kernels/benchmarks/bench_long_context.py                      all parts, some minutes on an H100
    python kernels/benchmarks/bench_long_context.py --parts speed --batches 1 --lengths 4096 131072
    python kernels/benchmarks/bench_long_context.py --parts prompt --prompt 131072                    a trial
    python kernels/benchmarks/bench_long_context.py --device cpu --layers 2 --hidden-size 64 --vocab-size 256 \
        --lengths 256 1024 --batches 1 2 --prompt 4096 --chunk 512 --tokens 4                   does the script run?

FoX (Pro) of 125M parameters, random weights in bfloat16, gate biases that forget within 1 to 10,000 tokens; a Qwen3 of
the same width, depth and heads. Parts:

- `speed`: milliseconds of a decoding step after each length and for each batch, of both models, each step replayed
  from a CUDA graph, --tokens steps one after the other without a wait (beside it the median of steps that are waited
  for, in which Python's part shows): `eager`, the models as they are; `compiled`, both through torch.compile, FoX as a
  `FusedStep`, the Transformer as `generate` does it with a static cache. Caches are filled directly, with random
  keys, in chunks: no prompt is computed. With `--decay-time 100` what is live after 4096 tokens is live after 131072,
  too. For the first batch also the bytes of the cache next to those of a cache of everything, and the share of keys
  that the proof dropped. Where the Transformer's cache does not fit, the largest batch that does is taken, for FoX as
  well.
- `prompt`: a prompt of --prompt tokens through the model in chunks, its tokens/s, the peak of allocated memory, and
  what of that is known: weights, cache, and the activations that one chunk takes alone.

Rows go to --json, which is written anew after each.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from _common import ROOT, commit
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

from fox_kernels.paged_attention import LARGEST_GATHER

sys.path.insert(0, str(ROOT))
from modeling_fox import FoxConfig, FoxEvictingCache, FoxForCausalLM, FusedStep, GraphedStep

FILL = 4096  # tokens that the cache is filled with at a time
SPARE = 3 * 2**30  # bytes that the largest batch leaves free
BEGAN = time.perf_counter()


def say(text):
    """A line with the seconds since the start."""
    print(f"{time.perf_counter() - BEGAN:6.0f} s  {text}", flush=True)


class Rows(list):
    """Results; written to a file whenever one is added."""

    def __init__(self, file):
        self.file = file

    def append(self, row):
        super().append(row)
        if self.file is not None:
            self.file.write_text(json.dumps(self, indent=1), encoding="utf-8")


def build(options):
    """Both models, of one shape."""
    heads = options.hidden_size // 64
    common = dict(
        vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    torch.manual_seed(0)
    fox = FoxForCausalLM(
        FoxConfig.pro(**common, fgate_decay_time_min=1.0, fgate_decay_time_max=options.decay_time, head_dim=64)
    )
    intermediate = fox.config.intermediate_size
    dense = Qwen3ForCausalLM(
        Qwen3Config(
            **common, head_dim=64, intermediate_size=intermediate, max_position_embeddings=2**21,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    for model in (fox, dense):
        model.eval().to(options.device, dtype)
        say(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    return fox, dense


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def new_cache(model, batch):
    """Evicting cache after one token, which sets everything up: bounds, shifts, pages."""
    cache = FoxEvictingCache(model.config)
    model(torch.zeros(batch, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    return cache


def fill(model, cache, length):
    """Random keys until `length` tokens are in the cache, gates as an untrained model makes them."""
    config, attention = model.config, [layer.self_attn for layer in model.model.layers]
    device, dtype, heads = model.device, model.dtype, config.num_attention_heads
    (store,) = cache.pages.stores.values()
    generator = torch.Generator(device).manual_seed(length)
    for begin in range(cache.get_seq_length(), length, FILL):
        number = min(FILL, length - begin)
        shape = (store.batch, heads, number, config.head_dim)
        keys = torch.randn(shape, device=device, generator=generator)
        keys = (keys / keys.square().mean(-1, keepdim=True).sqrt()).to(dtype)
        for idx, module in enumerate(attention):
            gates = torch.nn.functional.logsigmoid(module.fgate_proj.bias.float())
            spread = torch.rand(shape[:3], device=device, generator=generator) * 2.0
            store.extend(idx, keys, keys, gates[None, :, None] * spread)


def dense_cache(model, batch, length, room):
    cache = StaticCache(config=model.config, max_cache_len=-(-(length + room) // 64) * 64)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    model(token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            # One compilation for all lengths: no look at where a cache lies or how long it is.
            vars(tensor).pop("_dynamo_static_input_type", None)
            if tensor.dim() == 4:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
    return cache


def timed(step, tokens, device):
    """Milliseconds of a step: of `tokens` one after the other, and the median of steps that are waited for."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(tokens):
        step()
    synchronise(device)
    together = 1e3 * (time.perf_counter() - begin) / tokens
    alone = []
    for _ in range(tokens):
        begin = time.perf_counter()
        step()
        synchronise(device)
        alone.append(1e3 * (time.perf_counter() - begin))
    return together, statistics.median(alone)


def fox_step(model, cache, batch):
    """A step of FoX, or of a `FusedStep` of it, as a CUDA graph."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    if model.device.type != "cuda":
        return lambda: fox_plain(model, ids, cache)
    graphed = GraphedStep(model, cache)
    for _ in range(3):
        graphed(ids)
    return lambda: graphed(ids)


def fox_plain(model, ids, cache):
    if isinstance(model, FusedStep):
        return model(ids, cache)
    return model(ids, past_key_values=cache, use_cache=True).logits


def dense_step(model, forward, cache, batch, length):
    """A step of the Transformer as a CUDA graph; the mask moves with the cache's own counter."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    position = torch.full((batch, 1), length, dtype=torch.long, device=model.device)
    places = torch.arange(cache.layers[0].keys.shape[2], device=model.device)

    def step():
        # What is behind the newest token is masked, as `generate` does with a static cache.
        mask = (places <= cache.layers[0].cumulative_length)[None, None, None].expand(batch, -1, -1, -1)
        torch._dynamo.maybe_mark_dynamic(mask, 3)
        return forward(
            ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits  # fmt: skip

    for _ in range(2):
        step()
    if model.device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    synchronise("cuda")
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def largest_batch(model, length, room, wanted):
    """How many sequences of `length` a static cache has room for, at most `wanted`."""
    if model.device.type != "cuda":
        return wanted
    config = model.config
    one = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return min(wanted, (torch.cuda.mem_get_info()[0] - SPARE) // (one * (length + room)))


def release(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def tell_memory(fox, cache, length, rows):
    report, config = cache.report(), fox.config
    full = report.full_keys * (2 * config.head_dim * fox.dtype.itemsize + 8)
    live = int(report.live_keys.sum()) / report.full_keys
    say(
        f"memory {length:8} tokens: cache {report.memory_bytes / 2**20:9.1f} MiB, everything {full / 2**20:9.1f} "
        f"MiB, share {report.memory_bytes / full:.4f}; live keys {live:.4f}; bound {report.lost_mass_bound:.1e}"
    )
    rows.append(dict(part="memory", length=length, bytes=report.memory_bytes, full_bytes=full, live=live))


def part_speed(fox, dense, options, rows):
    steps = {name: fox if name == "eager" else FusedStep(fox, name) for name in options.modes}
    forwards = {"eager": dense, "compiled": torch.compile(dense)}
    for batch in options.batches:
        times = {}
        fits = dict.fromkeys(options.lengths, batch)
        for length in options.lengths if "transformer" in options.models else ():
            fits[length] = largest_batch(dense, length, 2 * options.tokens + 8, batch)
            for name in options.modes:
                time_dense(dense, forwards[name], name, fits[length], length, options, times)
            if fits[length] < batch and "fox" in options.models:
                time_fox(fox, steps, fits[length], [length], options, times, [])
        if "fox" in options.models:
            time_fox(fox, steps, batch, options.lengths, options, times, rows if batch == options.batches[0] else [])
        for length in options.lengths:
            for count in sorted({batch, fits[length]}):
                tell_speed(count, length, options.modes, times, rows)


def time_dense(dense, forward, name, batch, length, options, times):
    cache = step = None
    try:
        cache = dense_cache(dense, batch, length, 2 * options.tokens + 8)
        step = dense_step(dense, forward, cache, batch, length)
        ms, alone = timed(step, options.tokens, options.device)
        times["dense", name, batch, length] = ms
        say(f"Transformer, {name}, batch {batch}, {length} tokens: {ms:.3f} ms, waited for {alone:.3f}")
    except torch.OutOfMemoryError:
        say(f"Transformer, {name}, batch {batch}, {length} tokens: out of memory")
    cache = step = None
    release(options.device)


def time_fox(fox, steps, batch, lengths, options, times, rows):
    """One cache that grows from length to length."""
    cache = step = None
    try:
        cache = new_cache(fox, batch)
        for length in sorted(lengths):
            fill(fox, cache, length)
            tell_memory(fox, cache, length, rows)
            for name in options.modes:
                step = fox_step(steps[name], cache, batch)
                ms, alone = timed(step, options.tokens, options.device)
                times["fox", name, batch, length] = ms
                say(f"FoX, {name}, batch {batch}, {length} tokens: {ms:.3f} ms, waited for {alone:.3f}")
                step = None
    except torch.OutOfMemoryError:
        say(f"FoX, batch {batch}, {length} tokens: out of memory")
    cache = step = None
    release(options.device)


def tell_speed(batch, length, modes, times, rows):
    for name in modes:
        ms = {
            "fox": times.get(("fox", name, batch, length)),
            "dense": times.get(("dense", name, batch, length)),
        }
        text = "  ".join(
            f"{x} {ms[x]:.3f} ms {batch / ms[x] * 1e3:.0f} tokens/s" if ms[x] else f"{x}: not measured" for x in ms
        )
        ratio = f"  {ms['dense'] / ms['fox']:.2f} x" if all(ms.values()) else ""
        say(f"speed {name} batch {batch:3} after {length:7} tokens: {text}{ratio}")
        rows.append(dict(part="speed", mode=name, batch=batch, length=length, fox_ms=ms["fox"], dense_ms=ms["dense"]))


def part_prompt(fox, options, rows):
    """A long prompt in chunks, as `generate(prefill_chunk_size=...)` feeds it."""
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = sum(p.numel() * p.element_size() for p in fox.parameters())
    others = torch.cuda.memory_allocated() - weights if options.device == "cuda" else 0
    generator = torch.Generator().manual_seed(2)

    def chunk_of():
        return torch.randint(1, options.vocab_size, (1, options.chunk), generator=generator).to(options.device)

    # What a chunk takes by itself, without a cache and with kernels compiled.
    fox(chunk_of(), use_cache=False, logits_to_keep=1)
    synchronise(options.device)
    say("prompt: kernels without a cache are compiled")
    alone = 0
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        fox(chunk_of(), use_cache=False, logits_to_keep=1)
        alone = torch.cuda.max_memory_allocated() - weights - others
        torch.cuda.reset_peak_memory_stats()
    cache = FoxEvictingCache(fox.config)
    begin = time.perf_counter()
    chunks = range(0, options.prompt, options.chunk)
    for number, start in enumerate(chunks):
        fox(chunk_of(), past_key_values=cache, use_cache=True, logits_to_keep=1)
        if number % max(len(chunks) // 10, 1) == 0:
            synchronise(options.device)
            peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else 0.0
            seconds = time.perf_counter() - begin
            say(f"prompt: {start + options.chunk} tokens after {seconds:.1f} s, peak {peak:.1f} MiB so far")
    synchronise(options.device)
    seconds = time.perf_counter() - begin
    report = cache.report()
    peak = torch.cuda.max_memory_allocated() - others if options.device == "cuda" else 0
    # Gathered for the heads that are attended to together: their keys and values beside the new ones, and one of both
    # a second time.
    config = fox.config
    row = config.head_dim * fox.dtype.itemsize
    longest = int(report.live_keys.max())
    together = max(1, min(config.num_key_value_heads, LARGEST_GATHER // (2 * row * longest)))
    gathered = 3 * together * (longest + options.chunk) * row
    # Or, when the pool grows, its keys a second time.
    (store,) = cache.pages.stores.values()
    growing = store.keys.numel() * store.keys.element_size()
    explained = weights + report.memory_bytes + max(alone + gathered, growing)
    rate = options.prompt / seconds
    say(f"prompt {options.prompt} tokens in chunks of {options.chunk}: {rate:.0f} tokens/s; {report}")
    known = {"weights": weights, "cache": report.memory_bytes, "a chunk alone": alone}
    known |= {"and gathered keys": gathered, "or the growing pool": growing}
    text = ", ".join(f"{name} {x / 2**20:.1f}" for name, x in known.items())
    off = f"; off by {explained / peak - 1:+.1%}" if peak else ""
    say(f"prompt peak {peak / 2**20:.1f} MiB; explained {explained / 2**20:.1f} MiB: {text}{off}")
    rows.append(
        dict(
            part="prompt", length=options.prompt, seconds=seconds, peak=peak, weights=weights, alone=alone,
            cache=report.memory_bytes, gathered=gathered, bound=report.lost_mass_bound,
        )
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["speed", "prompt"], default=["speed", "prompt"], help="default: both"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=["eager", "compiled"],
        default=["eager", "compiled"],
        help="default: all",
    )
    parser.add_argument(
        "--models", nargs="+", choices=["fox", "transformer"], default=["fox", "transformer"],
        help="of `speed`; default: both",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=768, help="64 channels a head; default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=50304, help="default: %(default)s")
    parser.add_argument(
        "--decay-time", type=float, default=1e4, help="tokens of the slowest head; default: %(default)s"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 32768, 131072], help="default: %(default)s")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="sequences; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=100, help="steps timed; default: %(default)s")
    parser.add_argument(
        "--prompt", type=int, default=1_000_000, help="tokens, made whole chunks; default: %(default)s"
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where the rows go")
    options = parser.parse_args()
    options.prompt = -(-options.prompt // options.chunk) * options.chunk
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    fox, dense = build(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    say(f"{name}, torch {torch.__version__}, commit {commit()}")
    rows = Rows(options.json)
    if "speed" in options.parts:
        part_speed(fox, dense, options, rows)
    if "prompt" in options.parts:
        dense.to("cpu")
        part_prompt(fox, options, rows)


if __name__ == "__main__":
    main()
