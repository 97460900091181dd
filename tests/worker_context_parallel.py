"""Called by test_modeling_context_parallel.py on each of two processes: parts of rows give what whole rows give."""

import json
from contextlib import nullcontext

import torch
from torch import distributed

from helpers import random_tokens, tiny_fox
from modeling_fox import enable_context_parallel, pruning_stats

LENGTH = 64
FAST = {"fgate_decay_time_min": 1, "fgate_decay_time_max": 3}
CLOSED = {"fgate_decay_time_min": 0.02, "fgate_decay_time_max": 0.04}
PRUNED = {"log_pruning_tolerance": -5.0}
# Name, style, backend, config. Two processes: key heads 4 and 2 are dealt out as they are, 1 is copied first.
CASES = [
    ("pruned", "ulysses", "fox_acp", PRUNED | FAST),
    ("tight", "ulysses", "fox_acp", PRUNED | FAST | {"pruning_rule": "tight"}),
    ("one key head", "ulysses", "fox_acp", {"num_key_value_heads": 1}),
    ("other backend", "ulysses", "sdpa", {"use_rope": True, "num_key_value_heads": 4}),
    ("definition", "ulysses", "eager", {"qk_norm_shared": True}),
    ("ring", "ring", "fox_acp", {}),
    ("ring, one key head", "ring", "fox_acp", {"num_key_value_heads": 1, "use_rope": True}),
    ("ring, pruned", "ring", "fox_acp", PRUNED | FAST),
    ("ring, pruned, no norm", "ring", "fox_acp", PRUNED | FAST | {"use_qk_norm": False, "initializer_range": 0.05}),
    ("ring, hop pruned", "ring", "fox_acp", PRUNED | CLOSED),
]
PACKINGS = {"ring": ("one", "packed", "cut"), "ring, hop pruned": ("one",), "ring, pruned": ("one", "packed")}


def rows(packing):
    """Two rows: one document each; packed, with one across the border of the processes; or both cut just there."""
    tokens = random_tokens(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1).clone()
    labels = tokens.clone()
    starts = {"one": (), "packed": ((0, 5), (0, LENGTH // 2), (1, 20), (1, 50)), "cut": ((0, 32), (1, 7), (1, 32))}
    for row, start in starts[packing]:
        positions[row, start:] -= positions[row, start].clone()
        labels[row, start] = -100
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def loss_and_gradients(model, batch, count):
    model.zero_grad()
    prunes = model.config.log_pruning_tolerance is not None
    with pruning_stats(model) if prunes else nullcontext() as stats:
        loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, stats


def build(backend, config):
    model = tiny_fox(
        **{"attn_implementation": backend, "fgate_decay_time_min": 2, "fgate_decay_time_max": 100} | config
    )
    with torch.no_grad():
        for layer in model.model.layers:  # small scores, so that there is something to prune in 64 tokens
            if layer.self_attn.q_norm is not None:
                layer.self_attn.q_norm.weight.mul_(0.2)
    return model if backend == "fox_acp" else model.double()


def compare(name, style, backend, config, packing):
    batch = rows(packing)
    count = (batch["labels"][:, 1:] != -100).sum()
    whole, part = build(backend, config), build(backend, config)
    expected_loss, expected, expected_stats = loss_and_gradients(whole, batch, count)
    context = enable_context_parallel(part, style=style)
    loss, gradients, stats = loss_and_gradients(part, context.local(batch), count)
    distributed.all_reduce(loss)
    error = abs(float(loss - expected_loss)) / float(expected_loss)
    for key, gradient in gradients.items():
        distributed.all_reduce(gradient)
        scale = float(expected[key].abs().max()) + 1e-8
        error = max(error, float((gradient - expected[key]).abs().max()) / scale)
    found = {"name": name, "packing": packing, "rank": context.rank, "error": error}
    found |= {"skipped": context.hops_skipped, "hops": context.hops}
    if stats is not None:
        found["pruned"] = stats.pruned_fraction.mean().item()
        found["pruned_whole"] = expected_stats.pruned_fraction.mean().item()
        found["bound"] = stats.lost_mass_bound.max().item()
    return found


def refusals():
    """What each call that cannot be followed says."""
    model = tiny_fox(attn_implementation="sdpa", num_attention_heads=3, num_key_value_heads=1, hidden_size=48)
    calls = {
        "style": lambda: enable_context_parallel(model, style="zigzag"),
        "heads": lambda: enable_context_parallel(model),
        "ring": lambda: enable_context_parallel(model, style="ring"),
        "model": lambda: enable_context_parallel(torch.nn.Linear(2, 2)),
    }
    part = tiny_fox()
    enable_context_parallel(part)
    tokens = random_tokens(1, 8)
    calls["mask"] = lambda: part(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    # As DeepSpeed's data loader hands a row out, to a model that was not told.
    later = torch.arange(8)[None] + 8
    calls["part"] = lambda: tiny_fox().train()(tokens, position_ids=later, use_cache=False)
    calls["cache"] = lambda: part(tokens, use_cache=True)
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            yield {"refused": name, "message": str(error)}


def compare_all():
    """Prints one line of JSON for each case."""
    distributed.init_process_group("gloo")
    for case in CASES:
        for packing in PACKINGS.get(case[0], ("packed",)):
            print(json.dumps(compare(*case, packing)))
    for found in refusals():
        print(json.dumps(found))
    distributed.destroy_process_group()
