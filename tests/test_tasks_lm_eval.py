"""lm-eval on FoX: its `hf` model scores a local task as the forward pass says, and training shows in the score."""

import json

import pytest
import torch

from fox_training.tokenizers import byte_tokenizer
from helpers import tiny_fox

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-tasks")
from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = [
    pytest.mark.tasks,
    # Of the packages behind it; nothing of ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
ROWS = [
    {"question": "Where does a fox sleep?", "choices": ["den", "nest", "hive"], "answer": 0},
    {"question": "Where does a bee sleep?", "choices": ["den", "nest", "hive"], "answer": 2},
    {"question": "And where does the blackbird sleep?", "choices": ["den", "nest", "hive"], "answer": 1},
    {"question": "A badger?", "choices": ["den", "nest", "hive"], "answer": 0},
]
CHOICE = """
task: fox_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: fox_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list: [{{name: strip, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
"""


def right_answer(row):
    return f"{row['question']} {row['choices'][row['answer']]}."


def save_model(folder, steps):
    """A FoX that has seen question and answer `steps` times."""
    tokenizer = byte_tokenizer()
    tokens = {"vocab_size": 258, "pad_token_id": 257, "eos_token_id": 256, "bos_token_id": 256}
    model = tiny_fox(initializer_range=0.1, max_position_embeddings=128, **tokens)
    batch = tokenizer([right_answer(row) for row in ROWS], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def evaluate(folder, tasks):
    file = tasks / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("text", TEXT)):
        (tasks / f"{name}.yaml").write_text(text.format(file=file), encoding="utf-8")
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=["fox_choice", "fox_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        batch_size=4,
    )


@torch.no_grad()
def log_probability(model, tokenizer, context, ending):
    tokens = torch.tensor([tokenizer(context + ending)["input_ids"]])
    logits = model.eval()(tokens, use_cache=False).logits.log_softmax(-1)
    return float(logits[0, :-1].gather(1, tokens[0, 1:, None])[-len(ending) :].sum())


def test_it_scores_what_the_model_says_and_training_raises_the_score(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    scores = {}
    for name, steps in (("untrained", 0), ("trained", 40)):
        model, tokenizer = save_model(tmp_path / name, steps)
        found = evaluate(tmp_path / name, tmp_path / "tasks")
        results = found["results"]
        scores[name] = (results["fox_choice"]["acc,none"], results["fox_text"]["exact_match,strip"])
        # Scored in batches of padded rows, in an order of lm-eval's own.
        for sample, row in zip(found["samples"]["fox_choice"], ROWS, strict=True):
            got = [score for score, _ in sample["filtered_resps"]]
            expected = [log_probability(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]
            assert got == pytest.approx(expected, abs=1e-3)
    assert scores["untrained"][0] < 0.8 and scores["untrained"][1] == 0 and scores["trained"] == (1.0, 1.0)
