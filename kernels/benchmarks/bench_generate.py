"""Time greedy decoding of a FoX (Pro) by `generate`: a cache that grows, step by step, against a static one, compiled.

    python kernels/benchmarks/bench_generate.py                         125M parameters, one sequence, 512 tokens
    python kernels/benchmarks/bench_generate.py --batch 8 --prompt 4096 --log-pruning-tolerance -10
    python kernels/benchmarks/bench_generate.py --device cpu --layers 2 --hidden-size 64 --tokens 64

Weights are random and bfloat16 on a GPU, float32 on a CPU; gate biases are spread over the heads from 1 to 10,000
tokens. `static, compiled` is `generate(cache_implementation="static")` with `CompileConfig(fullgraph=True)`, which
replays CUDA graphs on a GPU; `fox, compiled` the same over the cache that forgets, with fused steps. Prints the median
of the rounds as tokens per second of all sequences, prompt included, and what TorchDynamo counted in the rounds of a
compiled mode: graphs, of which one is all that a decode step may need, breaks, and steps for which Inductor gave up
CUDA graphs. Beside them a Qwen3 of as many layers, heads and weights, step by step: what
Transformers' own Python costs. On Hopper PyTorch takes cuDNN's attention for it, which plans every length anew, so
that it is timed without cuDNN too. Fails if there is a second graph or a break, and writes nothing.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
from modeling_fox import FoxConfig, FoxForCausalLM  # noqa: E402


def build(options):
    torch.manual_seed(0)
    num_heads = options.hidden_size // 64
    config = FoxConfig.pro(
        hidden_size=options.hidden_size, num_hidden_layers=options.layers, num_attention_heads=num_heads,
        fgate_decay_time_min=1.0, fgate_decay_time_max=1e4, log_pruning_tolerance=options.log_pruning_tolerance,
    )  # fmt: skip
    return ready(FoxForCausalLM(config), options)


def build_qwen3(options, num_parameters):
    """As wide and deep; its MLP makes up for what FoX has beside it."""
    config = Qwen3Config(
        vocab_size=FoxConfig().vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64, num_key_value_heads=options.hidden_size // 64, head_dim=64,
    )  # fmt: skip
    rest = num_parameters / options.hidden_size - 2 * config.vocab_size - 4 * options.layers * options.hidden_size
    config.intermediate_size = max(round(rest / (3 * options.layers) / 64), 1) * 64
    return ready(Qwen3ForCausalLM(config), options)


def ready(model, options):
    model = model.eval().to(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def generate(model, prompt, num_tokens, mode):
    """Greedy continuation `(B, num_tokens)` by one of the modes of `MODES`."""
    settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
    settings["cache_implementation"], how = mode.split(", ")
    settings["disable_compile"] = how == "eager"
    if how == "compiled":
        settings["compile_config"] = CompileConfig(fullgraph=True)
        settings["compile_config"]._compile_all_devices = True
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return out[:, prompt.shape[1] :]


MODES = ("dynamic, eager", "static, eager", "static, compiled", "fox, eager", "fox, compiled")


def timed_s(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def bench(backend, model, prompt, options):
    """Print a line per mode, and one more of a compiled one; the number of graphs and breaks of each of those."""
    model.set_attn_implementation(backend)
    speeds, texts, found = {}, {}, []
    for mode in options.modes:
        torch._dynamo.reset()
        counters.clear()
        rounds = []
        # Compiling needs the length that is timed, the rest only its kernels.
        tokens = options.tokens if "compiled" in mode else min(options.tokens, 8)
        warm_up, _ = timed_s(lambda mode=mode, tokens=tokens: generate(model, prompt, tokens, mode), options.device)
        for _ in range(options.rounds):
            seconds, texts[mode] = timed_s(
                lambda mode=mode: generate(model, prompt, options.tokens, mode), options.device
            )
            rounds.append(prompt.shape[0] * options.tokens / seconds)
        speeds[mode] = statistics.median(rounds)
        first = options.modes[0]
        same = (texts[mode] == texts[first]).float().mean()
        print(
            f"{backend:8} {mode:17} {speeds[mode]:8.1f} tokens/s ({min(rounds):.1f} to {max(rounds):.1f}), "
            f"{speeds[mode] / speeds[first]:5.2f} of {first}; first round {warm_up:.1f} s; {same:.0%} of its tokens",
            flush=True,
        )
        if "compiled" in mode:
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            given_up = counters["inductor"]["cudagraph_skips"]
            print(f"{'':26} {graphs} graphs, {breaks} graph breaks, CUDA graphs given up {given_up}", flush=True)
            found.append((graphs, breaks))
    return found


def bench_qwen3(model, prompt, options):
    """Print its tokens per second in the first mode, with and without cuDNN's attention."""
    for name in ("qwen3", "qwen3, no cuDNN")[: 2 if options.device == "cuda" else 1]:
        torch.backends.cuda.enable_cudnn_sdp(name == "qwen3")
        timed_s(lambda: generate(model, prompt, 8, MODES[0]), options.device)
        seconds = [timed_s(lambda: generate(model, prompt, options.tokens, MODES[0]), options.device)[0]
                   for _ in range(options.rounds)]  # fmt: skip
        speeds = [prompt.shape[0] * options.tokens / s for s in seconds]
        print(
            f"{name:26} {statistics.median(speeds):8.1f} tokens/s ({min(speeds):.1f} to {max(speeds):.1f})", flush=True
        )
    torch.backends.cuda.enable_cudnn_sdp(True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=["sdpa", "fox_acp"], default=["fox_acp", "sdpa"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[MODES[0], MODES[2], MODES[4]])
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=768, help="64 channels a head; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="sequences; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=32, help="tokens; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="new tokens of a sequence; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up; default: %(default)s")
    parser.add_argument("--no-qwen3", action="store_true", help="FoX alone")
    parser.add_argument("--log-pruning-tolerance", type=float, help="nats, such as -10; default: nothing is pruned")
    options = parser.parse_args()
    # Inductor's own advice and deprecations; nothing about the figures.
    warnings.filterwarnings("ignore")
    model = build(options)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    print(
        f"{name}, torch {torch.__version__}, {size:.0f}M parameters, {options.batch} x {options.prompt} + "
        f"{options.tokens} tokens, log pruning tolerance {options.log_pruning_tolerance}"
    )
    prompt = torch.randint(1, 1000, (options.batch, options.prompt), device=options.device)
    if not options.no_qwen3:
        qwen3 = build_qwen3(options, size * 1e6)
        print(f"qwen3 has {sum(p.numel() for p in qwen3.parameters()) / 1e6:.0f}M parameters")
        bench_qwen3(qwen3, prompt, options)
        del qwen3
    found = [x for backend in options.backends for x in bench(backend, model, prompt, options)]
    if any(graphs != 1 or breaks for graphs, breaks in found):
        sys.exit("a compiled decode step must be one graph without breaks")


if __name__ == "__main__":
    main()
