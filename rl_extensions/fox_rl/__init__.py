"""Components for agents: networks, memory, early stopping, evaluation, and agents that are one file each.

Nothing is imported here: take what you need, e.g. `from fox_rl.policy import FoxPolicyModel`. Pruning and optimizers,
which language models use as well, are in `fox_training.sparsity` and `fox_training.optimizers`.
"""
