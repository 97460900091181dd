"""An agent of `fox_rl.agents` trained in one go, and one stopped between two checkpoints and started again."""

import pytest
import torch

from fox_rl.agents import training


def whole_and_resumed(module, options, folder, crash_at, modules=("network",)):
    """Train twice and check that nothing tells the two apart: weights, returns, log.

    Args:
        module: Of the agent.
        options: From the output folder to the options, with a checkpoint before `crash_at` and not at it.
        folder: Empty.
        crash_at: Environment step at which the second training is interrupted.
        modules: Attributes of the agent whose weights are compared.

    Returns:
        Both agents.
    """
    whole = module.train(options(str(folder / "whole")), quiet=True)
    crashing = module.Agent(options(str(folder / "parts")))
    advance = crashing.advance

    def crash():
        if crashing.step >= crash_at:
            raise KeyboardInterrupt
        return advance()

    crashing.advance = crash
    with pytest.raises(KeyboardInterrupt):
        training.run(crashing, quiet=True)
    assert crashing.step == crash_at < whole.step
    checkpoint = torch.load(folder / "parts" / "checkpoint_0.pt", weights_only=False)
    assert 0 < checkpoint["values"]["step"] < crash_at
    parts = module.train(options(str(folder / "parts")), quiet=True)
    for name in modules:
        pairs = zip(getattr(whole, name).parameters(), getattr(parts, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert whole.step == parts.step and whole.meter.returns == parts.meter.returns
    logs = [(folder / name / "metrics.jsonl").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    return whole, parts


def assert_pruned(network, pruner, sparsity):
    """The pruner has reached its sparsity, and every weight that it took away is 0 in the network."""
    assert pruner.sparsity() == pytest.approx(sparsity, abs=0.02)
    assert all(torch.all(network.get_parameter(name)[~keep] == 0) for name, keep in pruner.masks.items())
