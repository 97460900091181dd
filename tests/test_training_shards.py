"""Prepared shards: the same tokens as without them, and every kind of damage is one error with a way on."""

import itertools
import json
from concurrent.futures import Future

import datasets
import numpy as np
import pytest

from fox_training import shard_worker
from fox_training.data import build_tokenizer, load_documents, tokenise
from fox_training.pipeline import load_data
from fox_training.prepare import main, prepare
from fox_training.recipe import RecipeError, load_recipe
from fox_training.shards import ShardFolder
from fox_training.token_stream import MappedTokens
from fox_training.tokenizers import byte_tokenizer

TEXTS = [f"document {i} says <|endoftext|> wörld {'x' * (i % 7)}" if i % 9 else "" for i in range(60)]


def recipe_of(folder, *overrides):
    path = folder / "texts.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    options = ["data.source=local", f"data.path={path}", "data.validation_documents=5", "data.sequence_length=32"]
    return load_recipe(None, [*options, f"data.cache_dir={folder / 'cache'}", *overrides])


def shards_recipe(folder, *overrides):
    return load_recipe(None, ["data.source=shards", f"data.path={folder}", "data.sequence_length=32", *overrides])


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Worker processes cost seconds to start; one test has real ones."""

    class Pool:
        def __init__(self, arguments):
            shard_worker.start_worker(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def submit(self, function, *arguments):
            done = Future()
            try:
                done.set_result(function(*arguments))
            except Exception as error:
                done.set_exception(error)
            return done

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("fox_training.prepare._pool", lambda workers, arguments: Pool(arguments))


def prepared(folder, *overrides, **options):
    return prepare(recipe_of(folder, *overrides), folder / "shards", **{"shard_bytes": 500, **options})


@pytest.mark.parametrize("kind", ["byte", "bpe", "char", "hub"])
def test_shards_hold_the_tokens_that_the_recipe_would_have_trained_on(tmp_path, kind):
    options = [f"data.tokenizer.kind={kind}", "data.tokenizer.vocab_size=270"]
    if kind == "hub":  # as many files there, it cuts and pads
        cutting = byte_tokenizer()
        cutting(["a"], truncation=True, max_length=5, padding="max_length")
        cutting.save_pretrained(tmp_path / "tokenizer")
        options.append(f"data.tokenizer.path={tmp_path / 'tokenizer'}")
    described = prepared(tmp_path, *options)
    assert len(described["splits"]["train"]) > 3
    _, rows, validation, about = load_data(recipe_of(tmp_path, *options))
    tokenizer, shard_rows, shard_validation, shard_about = load_data(shards_recipe(tmp_path / "shards"))
    assert (shard_rows.stream.tokens[:] == rows.stream.tokens).all()
    assert (shard_rows.stream.starts == rows.stream.starts).all()
    assert (shard_validation.tokens[:] == validation.tokens).all()
    for key in ("documents", "tokens", "bytes"):
        assert shard_about["train"][key] == about["train"][key]
    for index in (0, 3, rows.rows_per_epoch + 1):  # across the seams of shards, and in another epoch
        assert (shard_rows.row(index).tokens == rows.row(index).tokens).all()
        assert (shard_rows.row(index).positions == rows.row(index).positions).all()
    train, held_out = load_documents(shards_recipe(tmp_path / "shards").data)
    plain_train, plain_held_out = load_documents(recipe_of(tmp_path).data)
    assert [row["text"] for row in train] == [text for text in plain_train["text"] if text]
    assert held_out["text"][:] == [text for text in plain_held_out["text"] if text]


def test_slices_of_mapped_tokens_are_those_of_one_array():
    whole = np.arange(20, dtype=np.uint16)
    mapped = MappedTokens([whole[:7], whole[7:8], whole[8:8], whole[8:]])
    assert len(mapped) == 20
    for begin, end in itertools.product(range(0, 22), range(0, 24)):
        assert mapped[begin:end].tolist() == whole[begin:end].tolist()


def files(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "shards").glob("*.safetensors"))}


def test_killed_preparing_goes_on_behind_the_finished_shards(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    prepared(tmp_path / "whole")
    write, written = shard_worker.write_shard, []

    def dies(folder, name, texts, following):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        return write(folder, name, texts, following)

    monkeypatch.setattr("fox_training.prepare.write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "killed")
    with pytest.raises(RecipeError, match="its preparation stopped. Start the same `fox prepare` again"):
        load_data(shards_recipe(tmp_path / "killed" / "shards"))
    monkeypatch.setattr("fox_training.prepare.write_shard", lambda *a: written.append(a[1]) or write(*a))
    prepared(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(written) == len(set(written)) == len(files(tmp_path / "whole"))
    assert not list((tmp_path / "killed" / "shards").glob("*.tmp"))


def test_a_streamed_source_is_prepared_and_resumed_too(tmp_path, monkeypatch):
    prepared(tmp_path)
    expected = files(tmp_path)
    write, written = shard_worker.write_shard, []

    def dies(folder, name, texts, following):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return write(folder, name, texts, following)

    recipe = recipe_of(tmp_path, "data.streaming=true")
    monkeypatch.setattr("fox_training.prepare.write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, tmp_path / "streamed", shard_bytes=500)
    monkeypatch.setattr("fox_training.prepare.write_shard", write)
    prepare(recipe, tmp_path / "streamed", shard_bytes=500)
    assert {p.name: p.read_bytes() for p in sorted((tmp_path / "streamed").glob("*.safetensors"))} == expected


def test_a_damaged_shard_is_named_and_both_ways_on_work(tmp_path):
    prepared(tmp_path)
    before, place = files(tmp_path), tmp_path / "shards" / "train-00001.safetensors"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(RecipeError, match=r"train-00001.safetensors is damaged: its SHA-256 .*--verify, or go on"):
        load_data(shards_recipe(tmp_path / "shards"))
    load_data(shards_recipe(tmp_path / "shards", "data.verify_shards=false"))
    _, rows, _, about = load_data(shards_recipe(tmp_path / "shards", "data.exclude_shards=[train-00001]"))
    gone = next(s for s in ShardFolder(tmp_path / "shards").described["splits"]["train"] if s["name"] == "train-00001")
    assert len(rows.stream.tokens) == sum(
        s["tokens"] for s in ShardFolder(tmp_path / "shards").described["splits"]["train"]
    ) - gone["tokens"]  # fmt: skip
    assert len(rows.stream.starts) == about["train"]["documents"]
    assert (rows.stream.tokens[:][rows.stream.starts] == 256).all()
    place.unlink()
    with pytest.raises(RecipeError, match="train-00001.safetensors is damaged: it cannot be read"):
        load_data(shards_recipe(tmp_path / "shards", "data.verify_shards=false"))
    place.write_bytes(content)
    said = []
    prepared(tmp_path, verify=True, say=said.append)
    assert said == ["train-00001 is written again: its SHA-256 is not the one that was written"]
    assert files(tmp_path) == before


def test_what_cannot_be_prepared_is_one_clear_error(tmp_path, monkeypatch):
    prepared(tmp_path)
    with pytest.raises(RecipeError, match="holds shards of other data: shard_bytes: 500 -> 600. Use another --output"):
        prepared(tmp_path, shard_bytes=600)
    with pytest.raises(RecipeError, match="tokenizer.kind: byte -> char"):
        prepared(tmp_path, "data.tokenizer.kind=char")
    with pytest.raises(RecipeError, match="--shard-bytes must be at least 1; got 0"):
        prepared(tmp_path, shard_bytes=0)
    with pytest.raises(RecipeError, match="--workers must be at least 1; got 0"):
        prepared(tmp_path, workers=0)
    with pytest.raises(RecipeError, match="data.exclude_shards train-1 is no shard .*Did you mean train-0000"):
        load_data(shards_recipe(tmp_path / "shards", "data.exclude_shards=[train-1]"))
    with pytest.raises(RecipeError, match=r"data.validation_documents 6 is not what .* prepared with \(5\)"):
        load_data(shards_recipe(tmp_path / "shards", "data.validation_documents=6"))
    same = shards_recipe(tmp_path / "shards", "data.validation_documents=5", "data.streaming=true")
    assert load_data(same)[3]["validation"]["validation_documents"] == 5
    with pytest.raises(RecipeError, match="holds no finished shards. Is it the one"):
        load_data(shards_recipe(tmp_path))
    with pytest.raises(RecipeError, match="prepare takes one source of text"):
        prepare(shards_recipe(tmp_path / "shards"), tmp_path / "x")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_worker, "write_file", full)
    with pytest.raises(RecipeError, match="No space left on device.*finished shards stay"):
        prepare(recipe_of(tmp_path), tmp_path / "full")


def test_a_text_that_the_tokenizer_does_not_know_is_an_error_of_the_user(tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "äQ"}) + "\n")
    recipe = recipe_of(tmp_path, "data.tokenizer.kind=char", "data.validation_documents=0",
                       f"data.validation_split={tmp_path / 'other.jsonl'}")  # fmt: skip
    with pytest.raises(RecipeError, match="the text cannot be tokenised: .*Missing"):
        prepare(recipe, tmp_path / "shards")


def test_the_command_prepares_on_processes_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    recipe = recipe_of(tmp_path)
    place = ["--output", str(tmp_path / "shards"), "--workers", "2", "--shard-bytes", "500"]
    arguments = [*place, "data.source=local", f"data.path={tmp_path / 'texts.jsonl'}", "data.validation_documents=5"]
    assert main(arguments) == 0
    assert "train      " in (said := capsys.readouterr().out) and "with 2 processes" in said
    documents, _ = load_documents(recipe.data)
    tokenizer, rows, _, _ = load_data(shards_recipe(tmp_path / "shards"))
    expected = tokenise(documents, tokenizer, tmp_path / "again", by_content=True)
    assert (rows.stream.tokens[:] == expected.tokens).all()
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "shards"), "data.source=local"])
    assert "data.path must name the data" in capsys.readouterr().err


def test_bpe_can_be_trained_on_a_part_of_the_text(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("fox_training.data.make_tokenizer", lambda recipe, texts: seen.extend(texts))
    recipe = recipe_of(tmp_path, "data.tokenizer.kind=bpe", "data.tokenizer.train_bytes=400")
    build_tokenizer(recipe, datasets.Dataset.from_dict({"text": ["a" * 100] * 20}))
    assert len(seen) == 4
