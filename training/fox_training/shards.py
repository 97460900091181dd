"""Prepared data: folders of token shards, written by `prepare.py` and mapped into memory here.

FOLDER/
    plan.json                    what is being prepared; a folder takes one data section only
    tokenizer/                   as `from_pretrained` loads it
    train-00000.safetensors      tokens, starts and document_bytes of a run of documents
    train-00000.json             its counts, size, SHA-256, and where the next shard begins; written after it
    validation-00000.safetensors
    prepared.json                the shards of each split; written last
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .recipe import RecipeError, nearest
from .token_stream import MappedTokens, TokenStream
from .tokenizers import hub_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

PLAN, PREPARED, TOKENIZER = "plan.json", "prepared.json", "tokenizer"
_DTYPES = {"U16": "<u2", "U32": "<u4", "I64": "<i8"}


class ShardFolder:
    """A finished folder of shards.

    Args:
        path: The folder.

    Raises:
        RecipeError: If the folder is not there or not finished.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        try:
            self.described = json.loads((self.path / PREPARED).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            started = (self.path / PLAN).is_file()
            raise RecipeError(
                f"data.path {self.path} holds no finished shards"
                + (": its preparation stopped. Start the same `fox prepare` again." if started else ". Is it the one?")
            ) from error
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.path / PREPARED} cannot be read: {error}. Run `fox prepare` again.") from error

    @property
    def plan(self) -> dict[str, Any]:
        """The data section that the shards were prepared from."""
        return json.loads((self.path / PLAN).read_text(encoding="utf-8"))["data"]

    @property
    def tokenizer_hash(self) -> str:
        """Of the tokenizer that wrote the tokens."""
        return self.described["tokenizer"]["hash"]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the tokens.

        Raises:
            RecipeError: If it is not the one that wrote them.
        """
        tokenizer = hub_tokenizer(str(self.path / TOKENIZER))
        if tokenizer_hash(tokenizer) != self.tokenizer_hash:
            raise RecipeError(f"{self.path / TOKENIZER} is not the tokenizer of the shards. Prepare them again.")
        return tokenizer

    def stream(
        self, split: str, *, exclude: list[str] | tuple[str, ...] = (), verify: bool = True
    ) -> TokenStream | None:
        """All documents of a split; None if it has none.

        Args:
            split: train or validation.
            exclude: Names of shards that are left out.
            verify: Compare each file with its SHA-256, besides its size.

        Raises:
            RecipeError: Naming the shard that is missing or damaged, and the two ways on.
        """
        shards = self.described["splits"].get(split, [])
        kept = [shard for shard in shards if shard["name"] not in exclude]
        if shards and not kept:
            raise RecipeError(f"data.exclude_shards leaves none of the {len(shards)} {split} shards in {self.path}.")
        if not kept:
            return None
        digest = hashlib.sha256(self.tokenizer_hash.encode())
        tokens, starts, sizes, position = [], [], [], 0
        for shard in kept:
            arrays = self._open(shard, verify)
            tokens.append(arrays["tokens"])
            starts.append(np.asarray(arrays["starts"]) + position)
            sizes.append(np.asarray(arrays["document_bytes"]))
            position += shard["tokens"]
            digest.update(shard["sha256"].encode())
        return TokenStream(
            MappedTokens(tokens), np.concatenate(starts), np.concatenate(sizes), digest.hexdigest()[:16]
        )

    def _open(self, shard: dict[str, Any], verify: bool) -> dict[str, np.ndarray]:
        path = self.path / f"{shard['name']}.safetensors"
        if reason := damage(path, shard, verify):
            raise RecipeError(
                f"shard {path} is damaged: {reason}. Write it again by the same `fox prepare` with --verify, or go on "
                f"without its {shard['documents']} documents: data.exclude_shards [{shard['name']}]."
            )
        return map_arrays(path)

    def check_excluded(self, names: list[str]) -> None:
        """Refuse names that no shard has.

        Raises:
            RecipeError: With the nearest name.
        """
        known = [shard["name"] for split in self.described["splits"].values() for shard in split]
        for name in names:
            if name not in known:
                raise RecipeError(f"data.exclude_shards {name} is no shard of {self.path}{nearest(name, known)}")


def damage(path: Path, shard: dict[str, Any], verify: bool) -> str | None:
    """What is wrong with the file of a shard, or None."""
    try:
        size = path.stat().st_size
        if size != shard["file_bytes"]:
            return f"it has {size} bytes instead of {shard['file_bytes']}"
        if verify and file_sha256(path) != shard["sha256"]:
            return "its SHA-256 is not the one that was written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file without reading them; source of the format: safetensors' documentation."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin = entry["data_offsets"][0] + 8 + length
        arrays[name] = np.memmap(
            path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=begin, shape=tuple(entry["shape"])
        )
    return arrays


def decoded(stream: TokenStream, tokenizer: PreTrainedTokenizerBase, every: int = 1) -> Iterator[dict[str, str]]:
    """Every `every`-th document of a stream as text again, rows with `id` and `text`."""
    starts, total = stream.starts, len(stream.tokens)
    for number in range(0, len(starts), every):
        end = int(starts[number + 1]) if number + 1 < len(starts) else total
        ids = stream.tokens[int(starts[number]) + 1 : end].tolist()
        yield {"id": str(number), "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
