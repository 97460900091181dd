"""fox_kernels as a kernel of the Hub: loaded by Hugging Face's `kernels`, beside the package and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fox_kernels
from fox_kernels import forgetting_attention
from helpers import attention_inputs, output_and_gradients

kernels = pytest.importorskip("kernels")
if not hasattr(kernels, "get_local_kernel"):  # an empty namespace: our folder of that name
    pytest.skip("needs `pip install kernels`", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
VARIANT = "torch-cuda" if torch.version.cuda and torch.cuda.is_available() else "torch-cpu"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder that the script writes."""
    out = tmp_path_factory.mktemp("hub") / "fox-kernels"
    command = [sys.executable, ROOT / "kernels" / "build_hub_kernel.py", out, "--repo-id", "someone/fox-kernels"]
    subprocess.run(command, check=True, capture_output=True)
    return out


# In a process in which `import fox_kernels` fails; the first argument is the folder, the others are pytest's.
ALONE = """
import sys
sys.modules["fox_kernels"] = None
import kernels, pathlib, pytest, torch
fox = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
q, k, v = torch.randn(3, 2, 4, 70, 16).unbind()
gates = torch.nn.functional.logsigmoid(torch.randn(2, 4, 70))
inputs = [x.requires_grad_() for x in (q, k, v, gates)]
out = fox.forgetting_attention(*inputs)
expected = fox.forgetting_attention_reference(*inputs)
for x, y in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, expected))):
    torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
assert kernels.get_kernel("someone/fox-kernels", version=1) is fox
assert sys.modules["fox_kernels"] is None
print("It stands alone.")

# The package's own tests, on the kernel: of the package only the name is left.
modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == fox.__name__}
sys.modules.update({name.replace(fox.__name__, "fox_kernels", 1): x for name, x in modules.items()})
sys.exit(pytest.main(["-q", "-x", "--rootdir=.", "-p", "no:cacheprovider", *sys.argv[2:], "tests"]))
"""
PYTEST = (
    *("--import-mode=importlib", "-o", "pythonpath=tests"),
    *("-W", "ignore::pytest.PytestUnknownMarkWarning"),
    *("-k", "float32 or hand_worked or closed_gate or of_the_others or band_mask"),
)


@pytest.fixture(scope="module")
def alone(project):
    """How the process of `ALONE` has ended."""
    return subprocess.run(
        [sys.executable, "-c", ALONE, project, *PYTEST], cwd=project, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"someone/fox-kernels={project}"},
    )  # fmt: skip


def test_the_hub_kernel_and_the_package_live_in_one_process(project):
    loaded = kernels.get_local_kernel(project)
    assert Path(loaded.__file__).is_relative_to(project)
    assert loaded.__all__ == fox_kernels.__all__
    inputs = attention_inputs(queries=150, kv_heads=2)
    grad_out = torch.randn(inputs[0].shape)
    got = output_and_gradients(loaded.forgetting_attention, inputs, grad_out, log_pruning_tolerance=-10.0)
    expected = output_and_gradients(forgetting_attention, inputs, grad_out, log_pruning_tolerance=-10.0)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    # Two sets of operators.
    ours, theirs = (getattr(torch.ops, name).forgetting_attention.default for name in ("fox_kernels", loaded.__name__))
    assert ours is not theirs


def test_the_hub_kernel_stands_alone(alone):
    assert "It stands alone.\n" in alone.stdout, alone.stderr


def test_the_operators_own_tests_pass_on_the_hub_kernel(alone):
    """Those that came along in its folder."""
    assert alone.returncode == 0, alone.stdout[-3000:] + alone.stderr[-2000:]
    assert " passed" in alone.stdout


def test_the_metadata_is_what_the_loader_expects(project):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    ids = set()
    for variant in sorted((project / "build").iterdir()):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (variant.name, metadata.version) == (f"torch-{str(metadata.backend.backend_type).lower()}", 1)
        assert metadata.id.isidentifier() and metadata.id in (variant / "_ops.py").read_text(encoding="utf-8")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert (variant / json.loads((variant / "metadata.json").read_text())["name"].replace("-", "_")).is_dir()
        ids.add(metadata.id)
    assert len(ids) == 3


def test_a_folder_with_something_in_it_is_left_alone(project):
    command = [sys.executable, ROOT / "kernels" / "build_hub_kernel.py", project]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "is not empty. Give a new folder" in done.stderr
