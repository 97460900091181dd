"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int = 0,
    kind: str = "cosine",
    final_fraction: float = 0.0,
    decay_fraction: float = 0.2,
) -> float:
    """Share of the peak learning rate at optimizer step `step`.

    Linear warm-up `(step + 1) / warmup_steps`, so that the first step already moves the weights, then with
    `progress` running from 0 to 1 over the remaining steps:

        cosine    final + (1 - final) (1 + cos(pi progress)) / 2
        linear    1 - (1 - final) progress
        wsd       1, then linear to `final` over the last `decay_fraction` of all steps
        constant  1

    Args:
        step: Optimizer step, counted from 0.
        steps: Steps of the whole run; beyond it the factor stays at its final value.
        warmup_steps: Steps of warm-up.
        kind: One of the names above.
        final_fraction: Factor at the end, in [0, 1].
        decay_fraction: wsd only, in (0, 1].

    Raises:
        ValueError: If `kind` is not one of the names above.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if kind == "cosine":
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "linear":
        return 1 - (1 - final_fraction) * progress
    if kind == "wsd":
        decay_steps = max(1, round(decay_fraction * steps))
        into_decay = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
        return 1 - (1 - final_fraction) * into_decay
    if kind == "constant":
        return 1.0
    raise ValueError(f"kind must be one of cosine, linear, wsd, constant; got {kind!r}.")
