"""Tokenising one shard in a process of its own. It imports little, so that sixteen of them start at once."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

DOCUMENTS_PER_BATCH = 64

_encode = None
_document_token = 0
_dtype = np.dtype(np.uint16)


def start_worker(tokenizer: str | bytes, document_token: int, dtype: str) -> None:
    """Initialise this process.

    Args:
        tokenizer: The JSON of a `tokenizers.Tokenizer`, or a pickled tokenizer of Transformers where there is none.
        document_token: Id that stands before each document.
        dtype: uint16 or uint32.
    """
    global _encode, _document_token, _dtype
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _document_token, _dtype = document_token, np.dtype(dtype)
    if isinstance(tokenizer, bytes):
        from fox_training.tokenizers import encode_documents

        loaded = pickle.loads(tokenizer)
        _encode = lambda texts: encode_documents(loaded, texts)  # noqa: E731
    else:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer)
        # Text that spells a special token stays text. Of all else `whole_texts` took care; this its file does not say.
        backend.encode_special_tokens = True
        _encode = lambda texts: (e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False))  # noqa: E731


def write_shard(folder: str, name: str, texts: list[str], following: Any) -> dict[str, Any]:
    """Tokenise `texts` into FOLDER/NAME.safetensors and describe it in FOLDER/NAME.json; each appears by one rename.

    Args:
        folder: Existing folder.
        name: Of the shard, e.g. train-00003.
        texts: Documents, none of them empty.
        following: Where the documents of the next shard begin; kept in the description.

    Returns:
        The description: name, documents, tokens, bytes, file_bytes, sha256, following.

    Raises:
        OSError: If the disk refuses; nothing stands under the final names then.
    """
    rows, starts, position = [], np.empty(len(texts), dtype=np.int64), 0
    for begin in range(0, len(texts), DOCUMENTS_PER_BATCH):
        for number, ids in enumerate(_encode(texts[begin : begin + DOCUMENTS_PER_BATCH]), start=begin):
            starts[number] = position
            rows.append(np.array([_document_token, *ids], dtype=_dtype))
            position += len(rows[-1])
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    content = save({"tokens": np.concatenate(rows), "starts": starts, "document_bytes": sizes})
    described = {
        "name": name,
        "documents": len(texts),
        "tokens": position,
        "bytes": int(sizes.sum()),
        "file_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "following": following,
    }
    write_file(Path(folder) / f"{name}.safetensors", content)
    write_file(Path(folder) / f"{name}.json", json.dumps(described).encode())
    return described


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is complete or not there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
