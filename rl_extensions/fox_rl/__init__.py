"""Reinforcement-learning components on top of FoX. Empty in this release: the package reserves its place in the layering."""

__all__: list[str] = []
