"""Every Triton kernel compiles for GPUs that are not there, exactly as it is launched, and spills in no loop."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
pytestmark = [
    pytest.mark.compile_ahead,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"),
    pytest.mark.skipif(os.environ.get("FOX_COMPILE_AHEAD") != "1", reason="takes minutes: set FOX_COMPILE_AHEAD=1"),
    # Triton 3.9 announces the default of 3.10.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}  # bytes a block may use
ATTENTION = tuple(
    f"forgetting_attention_{name}_kernel" for name in ("forward", "backward_query", "backward_key", "decode")
)

# Spills inside loops that a comment in tile_sizes.py justifies by a time measured with and without them.
WORTH_THEIR_SPILLS = {("forgetting_attention_backward_key_kernel", 128, "sm_90"): 60}

CASES = [("bfloat16", dim, target) for dim in (64, 128, 256) for target in SHARED_MEMORY]
CASES += [("float32", 64, "sm_90")]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("dtype", "dim", "target"), CASES)
def test_compiles_without_spills_in_its_loops(name, dtype, dim, target):
    from compile_ahead import compile_launch, record_launches, resources

    used = resources(compile_launch(record_launches(dim, getattr(torch, dtype), target)[name], target))
    print(name, dtype, dim, target, used)
    assert used["loops_with_products"], "found no loop with a matrix product: has the disassembly changed its form?"
    assert used["shared_bytes"] <= SHARED_MEMORY[target]
    assert sum(used["spills_in_loops"]) <= WORTH_THEIR_SPILLS.get((name, dim, target), 0), used


def test_every_other_kernel_compiles_without_a_stack():
    from compile_ahead import compile_launch, kernel_names, record_launches, resources

    recorders = record_launches(64, torch.bfloat16, "sm_90")
    assert set(recorders) == set(kernel_names())
    for name in set(recorders) - set(ATTENTION):
        assert recorders[name].call is not None, f"{name} is launched by nothing that compile_ahead.py calls"
        used = resources(compile_launch(recorders[name], "sm_90"))
        assert used["stack_bytes"] == 0 and used["shared_bytes"] <= SHARED_MEMORY["sm_90"], (name, used)


def test_every_kernel_compiles_for_amd():
    from compile_ahead import compile_launch, record_launches

    for name, recorder in record_launches(64, torch.bfloat16, "gfx942").items():
        assert compile_launch(recorder, "gfx942").asm["amdgcn"], name
