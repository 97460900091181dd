"""What the tests of Transformers import and the sdist of a release does not hold; written for this project.

Mixins that are missing stand empty, so their tests do not run. The rest does the same job as the missing original:
starting the ranks of a distributed test, and the part of a pipeline test that belongs to one task.
"""

import functools
import multiprocessing
import os
import socket

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import pipeline

__all__ = [
    "ExportGenerateTesterMixin", "ExportTesterMixin", "GenerationTesterMixin", "PipelineTests",
    "_get_distributed_backend", "_get_distributed_device_type", "_get_rank_device", "_set_rank_device",
    "_start_rank_processes", "config_common_kwargs", "run_distributed",
]  # fmt: skip


class ExportTesterMixin:
    """Empty: the export tests are not in an sdist."""


class ExportGenerateTesterMixin:
    """Empty, like the one above."""


class GenerationTesterMixin:
    """Empty: the generation tests are not in an sdist."""


config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["FoxModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to choose: all ranks are on the CPU."""


def _start_rank_processes(function, args: tuple = (), nprocs: int = 2) -> None:
    """Run `function(rank, *args)` in `nprocs` processes; what one of them raises is raised here."""
    # One server imports the libraries, which takes seconds, and every rank is a copy of it.
    multiprocessing.set_forkserver_preload(["torch", "transformers"])
    start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _in_process_group(rank: int, function, args: tuple, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """Decorator: `function(rank, *args)` on every rank of a process group, called as `function(*args)`."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_in_process_group, args=(function, args, world_size, port), nprocs=world_size)

        return run

    return decorate


class PipelineTests:
    """The part of a pipeline test that depends on the task: build the pipeline, and look at what it answers."""

    TASKS = {
        "ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
    }  # fmt: skip

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        name = type(model).__name__
        self.task = next((task for end, task in self.TASKS.items() if name.endswith(end)), "feature-extraction")
        model = model.to(getattr(torch, dtype))
        if model.can_generate():
            # Not the 256 tokens that a pipeline generates unless it is told.
            model.generation_config.max_new_tokens = 6
        return pipeline(self.task, model=model, tokenizer=tokenizer), ["This is a test", "Another, longer test"]

    def run_pipeline_test(self, pipe, examples):
        one, many = pipe(examples[0]), pipe(examples)
        assert len(many) == len(examples)
        check = getattr(self, "check_" + self.task.replace("-", "_"))
        check(pipe, examples[0], one)
        for example, answer in zip(examples, many, strict=True):
            check(pipe, example, answer)

    def check_text_generation(self, pipe, example, answer):
        (answer,) = answer
        assert answer["generated_text"].startswith(example)
        new_text = pipe(example, return_full_text=False, max_new_tokens=3, do_sample=False)[0]["generated_text"]
        full_text = pipe(example, max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert full_text == example + new_text
        pair = pipe(example, num_return_sequences=2, do_sample=True, max_new_tokens=2)
        assert len(pair) == 2

    def check_text_classification(self, pipe, example, answer):
        answer = answer[0] if isinstance(answer, list) else answer
        assert answer["label"] in pipe.model.config.label2id and 0 <= answer["score"] <= 1
        every = pipe(example, top_k=None)
        assert {x["label"] for x in every} == set(pipe.model.config.label2id)
        assert abs(sum(x["score"] for x in every) - 1) < 1e-2

    def check_feature_extraction(self, pipe, example, answer):
        (rows,) = answer
        assert len(rows) == len(pipe.tokenizer(example).input_ids)
        assert all(len(row) == pipe.model.config.hidden_size for row in rows)

    def check_token_classification(self, pipe, example, answer):
        assert len(answer) == len(pipe.tokenizer(example).input_ids)
        assert all(x["entity"] in pipe.model.config.label2id for x in answer)
