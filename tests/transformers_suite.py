"""Run the tests that Transformers has for its own models against FoX.

    python tests/transformers_suite.py [-n 2] [--required] [pytest arguments]

The tests are those of the installed release. They are no part of this repository: they are taken from, in this order,

1. the folder or sdist named by FOX_TRANSFORMERS_TESTS: a checkout of Transformers, an unpacked sdist, or the .tar.gz;
2. the cache, ~/.cache/fox-transformers or the folder named by FOX_CACHE;
3. the package index, by `pip download`, into the cache.

An sdist holds the common model tests, training, pipeline, tensor parallel and FSDP tests, but not the generation and
export tests nor `causal_lm_tester.py`. Those run too with a checkout; one that has only some of them is put over the
files of an sdist by hand. What the files import beyond what is there comes from `transformers_suite_stand_ins.py` and
`transformers_suite_tester.py`. Without any source one test is skipped, which says why; with --required that fails.
The last line counts what passed, was skipped with a reason that SKIPS explains, and failed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import transformers

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# What the files of an sdist import of the rest of the tree -> module of ours and name of what stands in for it.
STAND_INS = {
    "causal_lm_tester.py": ("transformers_suite_tester", "*"),
    "exporters/test_export.py": ("transformers_suite_stand_ins", "ExportTesterMixin, ExportGenerateTesterMixin"),
    "generation/test_utils.py": ("transformers_suite_stand_ins", "GenerationTesterMixin"),
    "utils/test_configuration_utils.py": ("transformers_suite_stand_ins", "config_common_kwargs"),
    "distributed_testing_utils.py": ("transformers_suite_stand_ins", "*"),
}
# What the tests skip by themselves: the reason they give, and what it is about FoX. Any other reason is a failure.
SKIPS = (
    (r"Flash Attention", "flash_attention_2 to 4 have no place for the decay c_i - c_j; `sdpa` puts it into the keys"),
    (r"RoPE", "the decay tells distances apart, so FoX has no RoPE unless asked, and then none of the scaled kinds"),
    (r"position embeddings", "no position table: no length at which one would be resized"),
    (r"sliding window", "no window: how far back a head sees is learned, and pruning follows from it"),
    (r"xpert parallel|token-dispatch|grouped_mm|batched_mm|MoE|experts|router", "one MLP for all tokens, no experts"),
    (r"omposite|[Ss]ub-?configs|does not support SDPA$", "one model and one config, not made of others"),
    (r"sequence-to-sequence|encoder-decoder", "a decoder only"),
    (
        r"No conversion found",
        "our weights need no conversion; those of others are tested in test_modeling_conversion.py",
    ),
    (r"is not in `self\.pipeline_model_mapping`", "a task on images, sound or tables, or without a head of FoX"),
    (r"`run_pipeline_test` is currently not implemented", "a task on images that Transformers has no test for"),
    (r"requires multiple accelerators", "one GPU here, or none"),
    (r"requires (accelerator|MPS|CUDA|torch accelerator)", "no GPU here"),
    (r"FSDP workers", "not as many cores here"),
    (
        r"requires (deepspeed|bitsandbytes|torchao|the kernels library|Timm|PyTesseract|av|vision|PEFT)",
        "not installed",
    ),
    (r"test is slow", "run with RUN_SLOW=1"),
    (r"requires optimum-quanto", "a quantized cache has no place for the gates and is refused"),
    (r"No MTP keys", "no layers that predict several tokens at once"),
    (r"no recurrent layer types", "the token shift is no layer type of theirs; its padding: test_modeling_cache.py"),
)
SKIPPED, COUNTS = Counter(), Counter()
PIPELINE_MODELS = (
    "FoxModel", "FoxForCausalLM", "FoxForSequenceClassification", "FoxForTokenClassification",
    "FoxForQuestionAnswering",
)  # fmt: skip
# Of a checkout, what the common tests need beside the files at its top.
FOLDERS = ("exporters", "generation", "utils", "pipelines")


def cache() -> Path:
    return Path(os.environ.get("FOX_CACHE") or Path.home() / ".cache" / "fox-transformers")


def find_source(version: str) -> Path:
    """A `tests` folder or an sdist of this release.

    Raises:
        FileNotFoundError: If there is none and none can be downloaded; the message says what to do.
    """
    given = os.environ.get("FOX_TRANSFORMERS_TESTS")
    if given:
        for candidate in (Path(given) / "tests", Path(given), Path(given) / f"transformers-{version}.tar.gz"):
            if (candidate / "test_modeling_common.py").exists() or candidate.is_file():
                return candidate
        raise FileNotFoundError(f"FOX_TRANSFORMERS_TESTS={given} holds no tests/test_modeling_common.py and no sdist")
    sdist = cache() / f"transformers-{version}.tar.gz"
    if not sdist.exists():
        # Metadata is made by setuptools: taken from this environment, it need not be downloaded too.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(cache()), f"transformers=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise FileNotFoundError(
                f"the sdist of transformers {version} could not be downloaded ({last}); set FOX_TRANSFORMERS_TESTS to "
                "a checkout of that release"
            )
    return sdist


def assemble(source: Path, version: str) -> Path:
    """Put the tests where they can be imported as the package `tests`, as they expect, with what they lack.

    Returns:
        The folder to put on `sys.path`.
    """
    folder = cache() / f"suite-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    if source.is_dir():
        for file in sorted(source.rglob("*.py")):
            name = file.relative_to(source)
            if len(name.parts) == 1 or name.parts[0] in FOLDERS:
                write(folder / "tests" / name, file.read_bytes())
    else:
        with tarfile.open(source) as archive:
            for member in archive.getmembers():
                name = Path(*Path(member.name).parts[1:])
                if member.isfile() and name.parts[0] == "tests" and ".." not in name.parts:
                    write(folder / name, archive.extractfile(member).read())
    link_library(folder)
    write_stand_ins(folder / "tests")
    return folder


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def link_library(folder: Path) -> None:
    """The tests look for the library beside them, in `src/transformers`."""
    library = folder / "src" / "transformers"
    library.parent.mkdir(parents=True, exist_ok=True)
    library.symlink_to(Path(transformers.__file__).parent, target_is_directory=True)


def write_stand_ins(package: Path) -> None:
    missing = {package / name: what for name, what in STAND_INS.items() if not (package / name).exists()}
    mixin = (package / "test_pipeline_mixin.py").read_text(encoding="utf-8")
    for module, name in re.findall(r"pipelines\.(test_\w+)(?: import |\.)(\w+)", mixin):
        file = package / "pipelines" / f"{module}.py"
        if not file.exists():
            missing[file] = ("transformers_suite_stand_ins", f"PipelineTests as {name}")
    for file, (module, what) in missing.items():
        write(file, f"from {module} import {what}\n".encode())
    for folder in {package, *(file.parent for file in missing)}:
        (folder / "__init__.py").touch()


def write_tiny_models(folder: Path) -> None:
    """What the pipeline tests load: a model of each class with a tokenizer, and the list of them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "training")]
    import modeling_fox
    from fox_training.tokenizers import byte_tokenizer

    summary = {}
    for name in PIPELINE_MODELS:
        tokenizer = byte_tokenizer()
        config = modeling_fox.FoxConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for part in (getattr(modeling_fox, name)(config), tokenizer):
            part.save_pretrained(folder / "fox" / name)
        summary[name] = {"tokenizer_classes": [type(tokenizer).__name__], "processor_classes": []}
    write(folder / "reports" / "tiny_model_summary.json", json.dumps(summary).encode())


def pytest_runtest_logreport(report):
    """Count the skips by what they say of FoX. This file is a plugin of the run that it starts."""
    # Neither subtests that passed, which have a context, nor the setup of a test.
    if report.outcome != "passed" or (report.when == "call" and not hasattr(report, "context")):
        COUNTS[report.outcome] += 1
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        row = next((row for row in SKIPS if re.search(row[0], reason)), (None, f"UNEXPLAINED: {reason}"))
        SKIPPED[row[1]] += 1


def pytest_sessionfinish(session):
    # On the workers of xdist nothing is counted.
    if any(about.startswith("UNEXPLAINED") for about in SKIPPED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("skipped by the tests of Transformers, because")
    for about, count in SKIPPED.most_common():
        terminalreporter.write_line(f"{count:4}  {about}")
    passed, skipped, failed = (COUNTS[outcome] for outcome in ("passed", "skipped", "failed"))
    terminalreporter.write_line(
        f"Transformers {transformers.__version__}: {passed} passed, {skipped} skipped with reason, {failed} failed"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--required", action="store_true", help="fail if the tests cannot be had")
    parser.add_argument("--fetch-only", action="store_true", help="print the folder of the tests and stop")
    options, pytest_arguments = parser.parse_known_args()
    environment = dict(os.environ, TRANSFORMERS_IS_CI="1", HF_HUB_OFFLINE="1")
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        folder = assemble(find_source(transformers.__version__), transformers.__version__)
    except FileNotFoundError as error:
        print(f"the tests of Transformers are missing: {error}", file=sys.stderr)
        if options.required:
            return 1
        environment["FOX_TRANSFORMERS_MISSING"] = str(error)
    else:
        if options.fetch_only:
            print(folder)
            return 0
        environment["FOX_TRANSFORMERS_SUITE"] = str(folder)
        write_tiny_models(folder / "tiny")
        environment["TRANSFORMERS_TINY_MODEL_PATH"] = str(folder / "tiny")
    # In the environment: some tests start pytest anew for themselves, without any option.
    options = ["-c", str(TESTS / "transformers_suite.ini"), "--rootdir", str(ROOT), "-p", "transformers_suite"]
    environment["PYTEST_ADDOPTS"] = " ".join(filter(None, (os.environ.get("PYTEST_ADDOPTS"), shlex.join(options))))
    command = [sys.executable, "-m", "pytest", str(TESTS / "test_transformers_suite.py"), *pytest_arguments]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
