"""From a recipe's data section to rows: what `train` trains on, and what `data_speed` measures alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .batches import PackedRows, StreamedRows
from .data import build_tokenizer, cache_folder, load_documents, sources_of, tokenise
from .mixing import MixedRows, MixedStream
from .recipe import DataRecipe, Recipe, RecipeError, reads_shards
from .shards import ShardFolder
from .token_stream import MappedTokens, TokenStream

if TYPE_CHECKING:
    from .batches import RowsByIndex, RowsInOrder


def load_data(
    recipe: Recipe, *, is_main: bool = True
) -> tuple[Any, RowsByIndex | RowsInOrder, TokenStream | None, dict[str, Any]]:
    """Tokenizer, training rows, validation tokens and the description for data.json.

    Args:
        recipe: The run.
        is_main: Whether this is the process that compares shards with their SHA-256.

    Raises:
        RecipeError: If the data is not there, damaged, or does not go together.
    """
    data = recipe.data
    tokenizer, train, validation = (_open_shards if reads_shards(data) else _open_texts)(recipe, is_main)
    if data.streaming:
        rows = [stream_rows(recipe, documents, tokenizer) for documents in train]
        fingerprint = " + ".join(
            f"stream {p.path} {p.config_name} {p.split} {p.revision}" for _, p in sources_of(data)
        )
        description: dict[str, Any] = {"fingerprint": fingerprint}
    else:
        rows = [
            PackedRows(
                stream, data.sequence_length, recipe.run.seed, reset=data.reset_at_documents,
                shift=data.shift_each_epoch,
            )
            for stream in train
        ]  # fmt: skip
        description = {"fingerprint": " + ".join(s.fingerprint for s in train), "train": describe(train)}
    weights = [weight for weight, _ in sources_of(data)]
    if len(weights) > 1:
        rows = [(MixedStream if data.streaming else MixedRows)(rows, weights, recipe.run.seed)]
        description["weights"] = weights
    held_out = joined(validation)
    if held_out is not None:
        if recipe.evaluation.max_documents:
            held_out = held_out.first_documents(recipe.evaluation.max_documents)
        description["validation"] = held_out.describe() | split_description(data)
    kind = {"kind": "hub", "path": None} if reads_shards(data) else {"kind": data.tokenizer.kind,
                                                                     "path": data.tokenizer.path}  # fmt: skip
    description["tokenizer"] = kind | {"tokens": len(tokenizer)}
    place = {"source": data.source, "path": data.path, "revision": data.revision}
    return tokenizer, rows[0], held_out, place | description


def _open_shards(recipe: Recipe, is_main: bool) -> tuple[Any, list[TokenStream], list[TokenStream | None]]:
    data = recipe.data
    folders = [ShardFolder(part.path) for _, part in sources_of(data)]
    if len({folder.tokenizer_hash for folder in folders}) > 1:
        raise RecipeError(
            "data.mixture must be of shards with one tokenizer. Prepare all with data.tokenizer.kind hub."
        )
    if len(folders) == 1:
        folders[0].check_excluded(data.exclude_shards)
    for folder in folders:
        _check_split(data, folder)
    options = {"exclude": data.exclude_shards, "verify": data.verify_shards and is_main}
    train = [folder.stream("train", **options) for folder in folders]
    if None in train:
        raise RecipeError(f"{folders[train.index(None)].path} holds no training shards. Prepare it again.")
    return folders[0].tokenizer(), train, [folder.stream("validation", **options) for folder in folders]


def _check_split(data: DataRecipe, folder: ShardFolder) -> None:
    """A recipe may repeat how the validation documents were chosen, but not change it."""
    for way, value in split_description(data).items():
        if value != (before := folder.plan.get(way)):
            raise RecipeError(
                f"data.{way} {value} is not what the shards in {folder.path} were prepared with ({before}). Leave it "
                "out, or prepare them again."
            )


def _open_texts(recipe: Recipe, is_main: bool) -> tuple[Any, list[Any], list[TokenStream | None]]:
    data = recipe.data
    if len(data.mixture) > 0 and data.tokenizer.kind in ("char", "bpe"):
        tokenizer = build_tokenizer(recipe, load_documents(data)[0])
    else:
        tokenizer = None
    train, validation, folder = [], [], cache_folder(data)
    for _, part in sources_of(data):
        documents, held_out = load_documents(part)
        tokenizer = tokenizer or build_tokenizer(recipe, documents)
        by_content = part.source != "hub"
        train.append(documents if data.streaming else tokenise(documents, tokenizer, folder, by_content=by_content))
        validation.append(
            tokenise(held_out, tokenizer, folder, by_content=by_content) if held_out is not None else None
        )
    return tokenizer, train, validation


def joined(streams: list[TokenStream | None]) -> TokenStream | None:
    """The documents of several streams behind one another; None without any."""
    found = [stream for stream in streams if stream is not None]
    if len(found) < 2:
        return found[0] if found else None
    before = np.cumsum([0, *(len(stream.tokens) for stream in found[:-1])])
    return TokenStream(
        MappedTokens([stream.tokens for stream in found]),
        np.concatenate([stream.starts + offset for stream, offset in zip(found, before, strict=True)]),
        np.concatenate([stream.document_bytes for stream in found]),
        " + ".join(stream.fingerprint for stream in found),
    )


def describe(streams: list[TokenStream]) -> dict[str, Any]:
    """Counts over all sources for data.json."""
    each = [stream.describe() for stream in streams]
    total = {key: sum(counts[key] for counts in each) for key in ("documents", "tokens", "bytes")}
    return {"fingerprint": " + ".join(counts["fingerprint"] for counts in each)} | total


def stream_rows(recipe: Recipe, documents: Any, tokenizer: Any) -> StreamedRows:
    """Rows of one streamed source."""
    data = recipe.data
    return StreamedRows(
        documents, tokenizer, data.sequence_length, recipe.run.seed, block=data.shuffle_block,
        reset=data.reset_at_documents,
    )  # fmt: skip


def split_description(data: DataRecipe) -> dict[str, Any]:
    """How the validation documents were chosen."""
    ways = ("validation_ids", "validation_fraction", "validation_split", "validation_documents", "validation_packages")
    return {way: getattr(data, way) for way in ways if getattr(data, way)}
