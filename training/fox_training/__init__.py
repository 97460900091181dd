"""Training, evaluation and sharing of Forgetting Transformers.

Run as modules: `python -m fox_training.train`, `.evaluate`, `.generate`, `.publish`; `fox` is a front to them.
"""
