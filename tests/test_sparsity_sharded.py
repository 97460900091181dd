"""Two processes: under FSDP2 masks and weights are those of one process, and agents keep one network between them."""

import sys

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, run_two
from torch import nn
from torch.distributed.fsdp import fully_shard

from fox_training.sparsity import MaskedPruner, SparsityConfig


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 7), nn.ReLU(), nn.Linear(7, 3))


def train(model, config, share):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    pruner = MaskedPruner(model, config, total_steps=12).attach(optimizer)
    states = None
    for step in range(12):
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[share]).square().mean().backward()
        optimizer.step()
        if step == 7:
            states = pruner.state_dict()
    return pruner, states


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def agree():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for options in ({}, {"allocation": "global"}, {"method": "rigl", "every_steps": 3}, {"method": "static_random"}):
        config = SparsityConfig(final_sparsity=0.8, **options)
        alone = net()
        pruner, state = train(alone, config, slice(0, 8))
        sharded = net()
        for layer in (sharded[0], sharded[2], sharded[4]):
            fully_shard(layer)
        fully_shard(sharded)
        parts, parts_state = train(sharded, config, slice(4 * rank, 4 * rank + 4))
        assert sharded[0].weight.to_local().shape[0] in (8, 9), sharded[0].weight.to_local().shape
        for (name, a), (_, b) in zip(alone.named_parameters(), sharded.named_parameters(), strict=True):
            torch.testing.assert_close(a.detach(), full(b).detach(), rtol=1e-5, atol=1e-6, msg=f"{options} {name}")
            if a.ndim > 1:
                assert torch.equal(a == 0, full(b) == 0), f"{options} {name}"
        assert parts.counts() == pruner.counts()
        assert set(state) == set(parts_state) and all(torch.equal(state[k], parts_state[k]) for k in state), options
        # What one process saved, two load, and a whole target network takes the masks of a sharded one.
        parts.load_state_dict(state)
        assert parts.step_count == 8
        target = net()
        parts.apply_to(target)
        pruner.load_state_dict(parts_state)
        zeros = {n: target.get_parameter(n)[~keep] for n, keep in pruner.masks.items()}
        assert all(torch.equal(z, torch.zeros_like(z)) for z in zeros.values())
    agents_agree(rank)
    dist.barrier()
    dist.destroy_process_group()
    print("rank", rank, "agrees")


def agents_agree(rank):
    """A pruned PQN: other environments in each process, the same weights; an agent with a replay buffer refuses."""
    sys.path.append(str(ROOT / "rl_extensions"))
    from fox_rl.agents import dqn, pqn, td3, training

    sizes = dict(num_envs=4, window=8, minibatches=2, epochs=1, width=16, total_steps=2 * 4 * 8 * 4, device="cpu")
    agent = pqn.Agent(pqn.Options(final_sparsity=0.5, **sizes))
    first = torch.as_tensor(agent.observation)
    training.run(agent, quiet=True)
    assert agent.step == 256 and agent.pruners["network"].sparsity() == pytest.approx(0.5, abs=0.01)
    for mine, is_same in ((first, False), *((p.detach().contiguous(), True) for p in agent.network.parameters())):
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both) == is_same
    for module, env_id in ((dqn, "CartPole-v1"), (td3, "Pendulum-v1")):
        with pytest.raises(ValueError, match="num_processes must be 1 with a replay buffer; got 2"):
            module.Agent(module.Options(env_id=env_id, total_steps=100, device="cpu"))


def test_two_processes_prune_and_act_as_one_does():
    pytest.importorskip("gymnasium")
    for rank, said in enumerate(run_two(agree, timeout=180)):
        assert f"rank {rank} agrees" in said


def test_fsdp1_is_refused_by_name():

    from fox_training.sparsity import MaskedPruner, SparsityConfig

    class FlatParameter(torch.nn.Parameter):
        pass

    model = torch.nn.Linear(4, 4)
    model.weight = FlatParameter(torch.zeros(16))
    with pytest.raises(ValueError, match="FlatParameter weight, which FSDP1 or ZeRO-3 has cut up. Use FSDP2"):
        MaskedPruner(model, SparsityConfig(final_sparsity=0.5), total_steps=10)
