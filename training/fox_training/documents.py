"""Where the commands get their documents from: a run's own splits, a local file or folder, or the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FORMATS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Documents:
    """Texts, each one document, and where they come from."""

    texts: list[str]
    source: str

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(text.encode()) for text in self.texts)

    def describe(self) -> dict:
        """Source, counts and a SHA-256 over the texts, for the JSON report."""
        digest = hashlib.sha256()
        for text in self.texts:
            # The length in front keeps ["ab"] and ["a", "b"] apart.
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return {
            "source": self.source,
            "documents": len(self.texts),
            "bytes": self.num_bytes,
            "sha256": digest.hexdigest(),
        }


def run_folder(model: str) -> Path | None:
    """The run folder OUT that a model lies in as OUT/model, or None."""
    folder = Path(model)
    return folder.resolve().parent if folder.is_dir() and (folder.resolve().parent / "recipe.yaml").is_file() else None


def of_run(run: Path, split: str) -> Documents:
    """The training or validation documents of a run, as its recipe.yaml defines them.

    Args:
        run: Folder with recipe.yaml.
        split: "train" or "validation".

    Raises:
        ValueError: If the recipe or its data cannot be read, or the split is empty.
    """
    from fox_training.data import load_documents
    from fox_training.recipe import load_recipe

    train, validation = load_documents(load_recipe(run / "recipe.yaml").data)
    dataset = train if split == "train" else validation
    return _checked([row["text"] for row in dataset], f"{split} split of {run / 'recipe.yaml'}")


def from_source(source: str, *, split: str = "validation", column: str = "text") -> Documents:
    """Documents of a file (.txt is one document, .jsonl and .parquet one per row), a folder of such files, or the Hub.

    Args:
        source: Path, or id of a dataset on the Hub, `user/name` or `user/name:configuration`.
        split: Of a Hub dataset.
        column: Field of a row that holds the text.

    Raises:
        ValueError: If the source is missing, empty, or has no such column.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _checked(_read_file(path, column), source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
        if not files:
            raise ValueError(f"--data must hold files that end in {', '.join(FORMATS)}; the folder {source} has none.")
        return _checked([text for file in files for text in _read_file(file, column)], source)
    if source.startswith((".", "/", "~")) or path.suffix in FORMATS or source.count("/") > 1:
        raise ValueError(f"--data must be an existing file or folder, or a Hub id; there is no {source}.")
    return _checked(_read_hub(source, split, column), f"{source} ({split})")


def _read_file(path: Path, column: str) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        if column not in table.column_names:
            raise ValueError(f"--column must be a column of {path}: {', '.join(table.column_names)}; got {column}.")
        return table.column(column).to_pylist()
    try:
        # newline="": translating line ends would change the number of bytes.
        with path.open(encoding="utf-8", newline="") as file:
            content = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, byte {error.start} is not. Convert it first.") from error
    return _read_rows(path, content, column) if path.suffix == ".jsonl" else [content]


def _read_rows(path: Path, content: str, column: str) -> list[str]:
    texts = []
    # Not splitlines: JSON strings may hold other line separators of Unicode unescaped.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)[column])
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, must be a JSON object, got {line[:40]!r}.") from error
        except KeyError as error:
            raise ValueError(f"{path}, line {number}, must have the field {column!r}. Pass --column NAME.") from error
    return texts


def _read_hub(source: str, split: str, column: str) -> Sequence[str]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data {source} could not be loaded from the Hub: {str(error).splitlines()[0]}") from error
    if column not in dataset.column_names:
        raise ValueError(f"--column must be a column of {source}: {', '.join(dataset.column_names)}; got {column}.")
    return dataset[column][:]


def _checked(texts: Sequence[str], source: str) -> Documents:
    wrong = next((text for text in texts if not isinstance(text, str)), "")
    if not isinstance(wrong, str):
        raise ValueError(f"documents must be text; {source} holds {wrong!r:.60}. Pass --column NAME.")
    kept = [text for text in texts if text]
    if not kept:
        raise ValueError(f"documents must hold text; {source} has {len(texts)} documents and no byte. Is it the file?")
    return Documents(kept, source)
