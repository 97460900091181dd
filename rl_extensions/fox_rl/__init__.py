"""Reinforcement-learning components on top of FoX. Empty in this release: it only holds its place in the layers."""

__all__: list[str] = []
