"""Agents, one file each: `python -m fox_rl.agents.pqn --help`, or `accelerate launch -m fox_rl.agents.pqn`."""
