"""Experiments whose results are in RESULTS.md: `python -m fox_rl.experiments --help`."""
