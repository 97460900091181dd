"""An endless episode: the cache of a FoX policy stays bounded and its outputs stay those of the full cache.

    python rl_extensions/examples/endless_rollout.py --steps 100000
    python rl_extensions/examples/endless_rollout.py --steps 2000 --every 500      a first try

The full cache is kept beside the evicting one for the first --compare steps (it grows, and every step with it costs
more); after that the policy reads the last --compare observations in parallel, at every line of the table. Prints a
Markdown table and ends with an error if a logit differs by 1e-4 or the memory grew after the first tenth (1000 steps
at least).
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from transformers import DynamicCache

from fox_rl.policy import FoxPolicyConfig, FoxPolicyModel


def build(decay_time: float, seed: int) -> FoxPolicyModel:
    """A random policy whose slowest head forgets within about `decay_time` steps."""
    torch.manual_seed(seed)
    model = FoxPolicyModel(FoxPolicyConfig(observation_size=8, action_size=6, fgate_decay_time_max=decay_time)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "fgate" not in name and "norm" not in name:
                parameter.mul_(4.0)  # so that memory shows in the logits
        model.policy_head.weight.mul_(25.0)
    return model


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the episode (default: 100000)")
    parser.add_argument("--every", type=int, default=10_000, help="steps between lines of the table (default: 10000)")
    parser.add_argument("--compare", type=int, default=4_096, help="see above (default: 4096)")
    parser.add_argument("--decay-time", type=float, default=16.0, help="of the slowest head, in steps (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and observations (default: 0)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = build(options.decay_time, options.seed)
    cache, full = model.new_cache(), DynamicCache(config=model.config)
    recent: list[torch.Tensor] = []
    worst, most_early, most, begin = 0.0, 0, 0, time.perf_counter()
    print(
        "| steps | cached by a head | bytes | largest difference of a logit | bound on the lost attention | steps/s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for step in range(1, options.steps + 1):
        observation = torch.randn(1, 1, 8)
        recent = (
            [*recent[-options.compare + 1 :], observation]
            if len(recent) >= options.compare
            else [*recent, observation]
        )
        logits = model(observation, past_key_values=cache, use_cache=True).logits
        if step <= options.compare:
            exact = model(observation, past_key_values=full, use_cache=True).logits
            worst = max(worst, float((logits - exact).abs().max()))
        most = max(most, cache.memory_bytes())
        most_early = most if step <= max(1_000, options.steps // 10) else most_early
        if step % options.every == 0:
            if step > options.compare:
                exact = model(torch.cat(recent, dim=1)).logits[:, -1:]
                worst = max(worst, float((logits - exact).abs().max()))
            rate = step / (time.perf_counter() - begin)
            print(
                f"| {step} | {int(cache.report().live_keys.max())} | {cache.memory_bytes()} | {worst:.1e} | "
                f"{cache.lost_mass_bound():.1e} | {rate:.0f} |",
                flush=True,
            )
    bounded = most <= 1.25 * most_early
    print(f"memory {'stays bounded' if bounded else 'GREW'}: at most {most_early} bytes early, {most} bytes in all")
    return 0 if bounded and worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
