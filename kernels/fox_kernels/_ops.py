"""The namespace of the operators in `torch.ops`. ../build_hub_kernel.py writes another for a kernel of the Hub."""


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` as `torch.library` wants it."""
    return f"fox_kernels::{op_name}"
