"""Write fox_kernels as a kernel project of the Hugging Face Hub: nothing to compile, one folder for each backend.

    python kernels/build_hub_kernel.py out/fox-kernels
    python kernels/build_hub_kernel.py out/fox-kernels --repo-id someone/fox-kernels

and then, with `pip install kernels`,

    fox = kernels.get_local_kernel(Path("out/fox-kernels"))          or, once uploaded,
    fox = kernels.get_kernel("someone/fox-kernels", version=1)
    fox.forgetting_attention(q, k, v, log_fgate)

What is written:
    build.toml, flake.nix, CARD.md, torch-ext/fox_kernels, tests    what kernel-builder builds from
    build/torch-{cpu,cuda,rocm}    what it would build: the sources, `_ops.py`, metadata.json

A process may hold several versions of a kernel and the package as well, so the operators of each live in a namespace
of its own: `_ops.py` is written anew with a name that ends in a hash of the sources. Format: "Kernel requirements" in
the documentation of github.com/huggingface/kernels, as `kernels` 0.17 reads it.
"""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "fox_kernels"
# They run wherever `import fox_kernels` finds the kernel.
TESTS = ["conftest.py", "helpers.py", "test_kernels_operator.py", "test_kernels_varlen.py"]
NAME = "fox-kernels"
BACKENDS = ["cpu", "cuda", "rocm"]
VERSION = 1  # to be raised with every change of the interface that is not backward compatible

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""
FLAKE_NIX = """\
{
  description = "Forgetting attention";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD_MD = """\
---
library_name: kernels
license: apache-2.0
---
# Forgetting attention

Causal attention whose scores decay by a learned forget gate ("Forgetting Transformer", arXiv:2503.02130), with
adaptive computation pruning (arXiv:2504.06949), forward and backward: Triton kernels on a GPU, PyTorch on a CPU.

```python
import torch
from kernels import get_kernel

fox = get_kernel("{repo_id}", version={version})
q, k, v = torch.randn(3, 1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16)  # (batch, heads, length, head_dim)
log_fgate = torch.nn.functional.logsigmoid(torch.randn(1, 8, 1024, device="cuda") + 4)
out = fox.forgetting_attention(q, k, v, log_fgate, log_pruning_tolerance=-10.0)
```

Also `forgetting_attention_varlen` (packed sequences) and `forgetting_attention_decode` (few queries, a long cache).
Triton comes with PyTorch for GPUs.
"""
OPS_PY = '''\
import torch

ops = torch.ops.{kernel_id}


def add_op_namespace_prefix(op_name: str):
    """Prefix op by namespace."""
    return f"{kernel_id}::{{op_name}}"
'''
# Older versions of `kernels` import a folder of this name within the variant.
SHIM_PY = '''\
"""The same symbols as the folder above, for versions of `kernels` that look here."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("{kernel_id}", _path)
_module = sys.modules.get("{kernel_id}")
if _module is None:
    _module = sys.modules["{kernel_id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
__all__ = _module.__all__
globals().update({{name: getattr(_module, name) for name in __all__}})
'''


def sources() -> dict[str, str]:
    """name -> text of every module of the package but `_ops.py`, which is generated."""
    return {
        path.name: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.glob("*.py")) if path.name != "_ops.py"
    }


def digest(folder: Path) -> dict:
    """Hashes of all files of a variant, as `kernels` checks them."""
    files = {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metadata.json"
    }
    return {"algorithm": "sha256", "files": files}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_variant(folder: Path, backend: str, version: int) -> None:
    """`folder/torch-<backend>`, which `kernels` loads."""
    modules = sources()
    content = hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()
    module_name = NAME.replace("-", "_")
    kernel_id = f"_{module_name}_{backend}_{content[:8]}"
    variant = folder / f"torch-{backend}"
    write(variant, modules | {"_ops.py": OPS_PY.format(kernel_id=kernel_id)})
    write(variant / module_name, {"__init__.py": SHIM_PY.format(kernel_id=kernel_id)})
    metadata = {
        "id": kernel_id, "name": NAME, "version": version, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": backend}, "digest": digest(variant),
    }  # fmt: skip
    write(variant, {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def build(out: Path, repo_id: str, version: int = VERSION) -> None:
    """Write the project to `out`, which must not exist or be empty.

    Raises:
        FileExistsError: If there is something in `out`.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty. Give a new folder, or remove it.")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    project = {
        "build.toml": BUILD_TOML.format(name=NAME, version=version, backends=backends, repo_id=repo_id),
        "flake.nix": FLAKE_NIX,
        "CARD.md": CARD_MD.format(repo_id=repo_id, version=version),
    }
    write(out, project)
    shutil.copy(ROOT / "LICENSE", out)
    write(out / "torch-ext" / NAME.replace("-", "_"), sources())
    write(out / "tests", {name: (ROOT / "tests" / name).read_text(encoding="utf-8") for name in TESTS})
    for backend in BACKENDS:
        write_variant(out / "build", backend, version)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--repo-id", default=f"your-name/{NAME}", help="on the Hub; default: %(default)s")
    options = parser.parse_args()
    try:
        build(options.out, options.repo_id)
    except FileExistsError as error:
        sys.exit(str(error))
    print(f"{options.out}: kernels.get_local_kernel(Path({str(options.out)!r})) loads it")


if __name__ == "__main__":
    main()
