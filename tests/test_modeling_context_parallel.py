"""Rows cut up over two processes give the loss and the gradients of whole rows, by both styles and all backends."""

import json
import math

import pytest
import torch
from processes import run_two
from worker_context_parallel import compare_all

from helpers import attention_inputs, tiny_fox
from modeling_fox import ContextParallel


@pytest.fixture(scope="module")
def found():
    """What both processes printed; one launch for all tests here."""
    return [json.loads(line) for said in run_two(compare_all) for line in said.splitlines() if line.startswith("{")]


def test_loss_and_every_gradient_are_those_of_one_process(found):
    """Token shift over the border, documents across and at it, heads that are copied: a mistake in any shows here."""
    cases = [row for row in found if "name" in row]
    assert len(cases) == 2 * 13
    # eager computes in float64 throughout; the others in float32, in sums of another order. A hop that is not sent is
    # one that pruning may leave out, which one process does not do with it here: 64 tokens are one block.
    bounds = {"definition": 1e-13, "ring, hop pruned": math.exp(-5)}
    for row in cases:
        assert row["error"] < bounds.get(row["name"], 1e-5), row


def test_pruning_is_that_of_one_process(found):
    rows = [row for row in found if "pruned" in row]
    for row in rows:
        if row["name"] != "ring, hop pruned":
            assert row["pruned"] == pytest.approx(row["pruned_whole"], abs=1e-6), row
        assert row["bound"] < math.exp(-5), row
    # All pairs of the two halves.
    unsent = [row for row in rows if row["name"] == "ring, hop pruned" and row["packing"] == "one"]
    assert [row["pruned"] for row in unsent] == pytest.approx([32 * 32 / (64 * 65 / 2)] * 2)


def test_the_ring_sends_nothing_that_nobody_sees(found):
    """Process 1 has two hops, one a layer; process 0 has none to wait for."""
    hops = {(r["name"], r["packing"]): (r["skipped"], r["hops"]) for r in found if r.get("rank") == 1}
    assert hops["ring", "one"] == (0, 2) and hops["ring", "packed"] == (0, 2)
    assert hops["ring", "cut"] == (2, 2)
    assert hops["ring, pruned", "one"] == (0, 2)
    assert hops["ring, hop pruned", "one"] == (2, 2)


def test_what_cannot_work_is_refused(found):
    messages = {row["refused"]: row["message"] for row in found if "refused" in row}
    assert "`style` must be one of ('ulysses', 'ring'); got 'zigzag'" in messages["style"]
    assert "deals 3 heads out to 2 processes" in messages["heads"]
    assert "`style='ring'` needs attn_implementation 'fox_acp'; got 'sdpa'" in messages["ring"]
    assert "`model` must be a FoX model; got Linear" in messages["model"]
    assert "`attention_mask` must be None" in messages["mask"]
    assert "`use_cache` must be False" in messages["cache"]
    assert "`position_ids` must start at 0 where there is no cache; got 8" in messages["part"]


def test_accelerate_refuses_its_own_form():
    from accelerate.big_modeling import _attach_context_parallel_hooks

    with pytest.raises(ValueError, match="does not support attention layers of type .'forgetting_attention'"):
        _attach_context_parallel_hooks(tiny_fox())


class OneOfMany(ContextParallel):
    """A process of a group that does not exist; `told` stands for what the others say."""

    def __init__(self, rank, size, told):
        self.group, self.style, self.rank, self.size, self.told = None, "ring", rank, size, told
        self.hops = self.hops_skipped = 0

    def all_gather(self, x, dim):
        self.told[self.rank] = x
        return torch.cat([self.told.get(r, torch.zeros_like(x)) for r in range(self.size)], dim=dim)


@pytest.mark.parametrize("tolerance", [None, -5.0])
@pytest.mark.parametrize("gates", [(-3.0, 0.0), (2.0, 4.0), (6.0, 8.0)])
def test_every_process_of_many_sees_as_far_as_the_decay_matrix_says(gates, tolerance):
    size, num_tokens = 6, 8
    query, key, _, log_fgate = attention_inputs(queries=size * num_tokens, gate_logits=gates, dim=16)
    log_fgate[:, :, 19] = float("-inf")  # a document starts inside process 2
    module = tiny_fox(log_pruning_tolerance=tolerance, use_qk_norm=False).model.layers[0].self_attn
    told = {}
    for _ in range(2):  # the second time with what all have said
        plans = []
        for rank in range(size):
            part = slice(rank * num_tokens, (rank + 1) * num_tokens)
            process = OneOfMany(rank, size, told)
            inputs = (query[:, :, part], key[:, :, part], log_fgate[:, :, part])
            plans.append(process._view(module, *inputs, 0.25, tolerance)[1])
    assert all(plan == plans[0] for plan in plans)
    # The definition: any pair of the two chunks whose decay is not below the threshold.
    sums = log_fgate.double().masked_fill(log_fgate.isinf(), -1e9).cumsum(-1)
    decay = sums[..., :, None] - sums[..., None, :]
    threshold = -1e4
    if tolerance is not None:
        bound = 0.25 * query.norm(dim=-1).amax(-1) * key.norm(dim=-1).amax(-1)
        threshold = (-2 * bound - torch.tensor(float(size * num_tokens)).log() + tolerance)[..., None, None]
    seen = (decay >= threshold).any(0).any(0)
    for reader in range(size):
        chunks = [s for s in range(reader + 1) if seen[
            reader * num_tokens : (reader + 1) * num_tokens, s * num_tokens : (s + 1) * num_tokens
        ].any()]  # fmt: skip
        assert plans[0][reader] == min(chunks), (reader, plans[0])
    # The document alone ends the view of processes 3 to 5 at process 2; fast gates end it sooner.
    assert (sum(plans[0]) > 6) == (tolerance is not None and gates[0] < 0)
