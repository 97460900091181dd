"""Long contexts: FoX with the cache that forgets, beside a Transformer of the same size with SDPA and a static cache.

    python kernels/benchmarks/bench_long_context.py                      all parts, about two minutes on an H100
    python kernels/benchmarks/bench_long_context.py --parts memory speed
    python kernels/benchmarks/bench_long_context.py --device cpu --layers 2 --hidden-size 64 --vocab-size 256 \
        --lengths 256 1024 --batches 1 2 --prompt 4096 --chunk 512 --tokens 4                   does the script run?

FoX (Pro) of 125M parameters, random weights in bfloat16, gate biases that forget within 1 to 10,000 tokens; a Qwen3 of
the same width, depth and heads. Parts:

- `memory`: bytes of the cache after each length, next to those of a cache of everything, and the share of keys that
  the proof dropped.
- `speed`: milliseconds of a decoding step after each length and for each batch, of both models, each step replayed
  from a CUDA graph, median of --tokens steps. Caches are filled directly, with random keys, in chunks: no prompt is
  computed. With `--decay-time 100` what is live after 4096 tokens is live after 131072, too.
- `prompt`: a prompt of --prompt tokens through the model in chunks, its tokens/s, the peak of allocated memory, and
  what of that is known: weights, cache, and the activations that one chunk takes alone.

Rows go to --json. A row whose memory does not fit says so and is left out.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from _common import ROOT, commit
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

sys.path.insert(0, str(ROOT))
from modeling_fox import FoxConfig, FoxEvictingCache, FoxForCausalLM, GraphedStep

FILL = 4096  # tokens that the cache is filled with at a time


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
        print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    return fox, dense


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def filled_cache(model, batch, length):
    """Evicting cache after `length` tokens of random keys, gates as an untrained model makes them."""
    config, attention = model.config, [layer.self_attn for layer in model.model.layers]
    cache = FoxEvictingCache(config)
    device, dtype, heads = model.device, model.dtype, config.num_attention_heads
    # The first token sets everything up: bounds, shifts, pages.
    model(torch.zeros(batch, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    (store,) = cache.pages.stores.values()
    generator = torch.Generator(device).manual_seed(1)
    for begin in range(1, length, FILL):
        number = min(FILL, length - begin)
        shape = (batch, heads, number, config.head_dim)
        keys = torch.randn(shape, device=device, generator=generator)
        keys = (keys / keys.square().mean(-1, keepdim=True).sqrt()).to(dtype)
        for idx, module in enumerate(attention):
            gates = torch.nn.functional.logsigmoid(module.fgate_proj.bias.float())
            spread = torch.rand(batch, heads, number, device=device, generator=generator) * 2.0
            store.extend(idx, keys, keys, gates[None, :, None] * spread)
    return cache


def dense_cache(model, batch, length, room):
    cache = StaticCache(config=model.config, max_cache_len=length + room)
    token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    model(token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    return cache


def median_ms(step, tokens, device):
    """Median of the milliseconds of a call."""
    times = []
    for _ in range(tokens):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def fox_step(model, cache, batch):
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    if model.device.type != "cuda":
        return lambda: model(ids, past_key_values=cache, use_cache=True).logits
    graphed = GraphedStep(model, cache)
    for _ in range(3):
        graphed(ids)
    return lambda: graphed(ids)


def dense_step(model, cache, batch, length):
    """A step of the Transformer as a CUDA graph; the positions and the mask move with the cache's own counter."""
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    position = torch.full((batch, 1), length, dtype=torch.long, device=model.device)
    places = torch.arange(cache.layers[0].keys.shape[2], device=model.device)

    def step():
        # What is behind the newest token is masked, as `generate` does with a static cache.
        mask = (places <= cache.layers[0].cumulative_length)[None, None, None]
        return model(
            ids, attention_mask=mask.expand(batch, -1, -1, -1), position_ids=position, past_key_values=cache,
            use_cache=True,
        ).logits  # fmt: skip

    step()
    if model.device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    synchronise("cuda")
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def part_memory(fox, options, rows):
    for length in options.lengths:
        cache = filled_cache(fox, 1, length)
        report = cache.report()
        config = fox.config
        full = report.full_keys * (2 * config.head_dim * fox.dtype.itemsize + 8)
        live = int(report.live_keys.sum()) / report.full_keys
        print(
            f"memory {length:8} tokens: cache {report.memory_bytes / 2**20:9.1f} MiB, everything {full / 2**20:9.1f} "
            f"MiB, share {report.memory_bytes / full:.4f}; live keys {live:.4f}; bound {report.lost_mass_bound:.1e}",
            flush=True,
        )
        rows.append(dict(part="memory", length=length, bytes=report.memory_bytes, full_bytes=full, live=live))


def part_speed(fox, dense, options, rows):
    for batch in options.batches:
        for length in options.lengths:
            row = dict(part="speed", batch=batch, length=length)
            for name in ("fox", "dense"):
                try:
                    if name == "fox":
                        cache = filled_cache(fox, batch, length)
                        step = fox_step(fox, cache, batch)
                    else:
                        cache = dense_cache(dense, batch, length, options.tokens + 8)
                        step = dense_step(dense, cache, batch, length)
                    row[f"{name}_ms"] = median_ms(step, options.tokens, options.device)
                except torch.OutOfMemoryError:
                    row[f"{name}_ms"] = None
                cache = step = None
                if options.device == "cuda":
                    torch.cuda.empty_cache()
            rows.append(row)
            rates = {x: batch / row[f"{x}_ms"] * 1e3 if row[f"{x}_ms"] else None for x in ("fox", "dense")}
            text = "  ".join(
                f"{x} {row[f'{x}_ms']:.3f} ms {rates[x]:.0f} tokens/s" if rates[x] else f"{x}: out of memory"
                for x in rates
            )
            ratio = f"  {rates['fox'] / rates['dense']:.2f} x" if all(rates.values()) else ""
            print(f"speed batch {batch:3} after {length:7} tokens: {text}{ratio}", flush=True)


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
    alone = 0
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        fox(chunk_of(), use_cache=False, logits_to_keep=1)
        alone = torch.cuda.max_memory_allocated() - weights - others
        torch.cuda.reset_peak_memory_stats()
    cache = FoxEvictingCache(fox.config)
    begin = time.perf_counter()
    for start in range(0, options.prompt, options.chunk):
        fox(chunk_of()[:, : options.prompt - start], past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronise(options.device)
    seconds = time.perf_counter() - begin
    report = cache.report()
    peak = torch.cuda.max_memory_allocated() - others if options.device == "cuda" else 0
    # The gathered keys of the heads that are attended to together, beside the pages they come from.
    config = fox.config
    longest = int(report.live_keys.max()) + options.chunk
    gathered = 4 * longest * config.head_dim * fox.dtype.itemsize
    # Or, when the pool grows, its keys a second time.
    (store,) = cache.pages.stores.values()
    growing = store.keys.numel() * store.keys.element_size()
    explained = weights + report.memory_bytes + max(alone + gathered, growing)
    rate = options.prompt / seconds
    print(f"prompt {options.prompt} tokens in chunks of {options.chunk}: {rate:.0f} tokens/s; {report}")
    known = {"weights": weights, "cache": report.memory_bytes, "a chunk alone": alone}
    known |= {"and gathered keys": gathered, "or the growing pool": growing}
    text = ", ".join(f"{name} {x / 2**20:.1f}" for name, x in known.items())
    off = f"; off by {explained / peak - 1:+.1%}" if peak else ""
    print(f"prompt peak {peak / 2**20:.1f} MiB; explained {explained / 2**20:.1f} MiB: {text}{off}", flush=True)
    rows.append(
        dict(
            part="prompt", length=options.prompt, seconds=seconds, peak=peak, weights=weights, alone=alone,
            cache=report.memory_bytes, gathered=gathered, bound=report.lost_mass_bound,
        )
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["memory", "speed", "prompt"], default=["memory", "speed", "prompt"]
    )
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
    parser.add_argument("--prompt", type=int, default=1_000_000, help="tokens; default: %(default)s")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where the rows go")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    fox, dense = build(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(f"{name}, torch {torch.__version__}, commit {commit()}")
    rows = []
    if "memory" in options.parts:
        part_memory(fox, options, rows)
    if "speed" in options.parts:
        part_speed(fox, dense, options, rows)
    if "prompt" in options.parts:
        dense.to("cpu")
        part_prompt(fox, options, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
