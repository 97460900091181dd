"""Where the commands get their documents from: a run's own splits, a local file or folder, or the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


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
    # As the user wrote it where possible: the path ends up in reports that are published.
    folder = Path(model) if Path(model).name else Path(model).resolve()
    return folder.parent if folder.is_dir() and (folder.parent / "recipe.yaml").is_file() else None


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

    recipe = load_recipe(run / "recipe.yaml").data
    source = f"{split} documents of {run / 'recipe.yaml'}"
    if recipe.streaming and split == "train":
        raise ValueError(f"--ngram-data is needed: the training documents of {run} are a stream without a known end.")
    train, validation = load_documents(recipe)
    if split == "validation" and validation is None:
        raise ValueError(f"--data is needed: the recipe of {run} holds no validation documents out.")
    return _checked(train if split == "train" else validation, source)


def from_source(source: str, *, split: str = "validation", column: str = "text") -> Documents:
    """Documents of a local file or folder (.txt is one document, .jsonl and .parquet one per row), or of the Hub.

    Args:
        source: Path, or id of a dataset on the Hub, `user/name` or `user/name:configuration`.
        split: Of a Hub dataset.
        column: Field of a row that holds the text.

    Raises:
        ValueError: If the source is missing, empty, or has no such column.
    """
    # Imported here so that --help answers at once.
    from fox_training.data import FORMATS, load_documents
    from fox_training.recipe import DataRecipe, RecipeError

    path = Path(source).expanduser()
    is_local = path.exists() or source.startswith((".", "/", "~")) or path.suffix in FORMATS or source.count("/") > 1
    name, _, configuration = source.partition(":")
    if is_local:
        recipe = DataRecipe(source="local", path=source, text_column=column)
    else:
        recipe = DataRecipe(
            source="hub", path=name, config_name=configuration or None, split=split, text_column=column
        )
    try:
        documents, _ = load_documents(recipe)
    except RecipeError as error:
        raise ValueError(f"--data {source}: {error}") from error
    return _checked(documents, source if is_local else f"{source} ({split})")


def _checked(rows: Iterable[dict], source: str) -> Documents:
    texts = [row["text"] for row in rows]
    wrong = next((text for text in texts if not isinstance(text, str)), "")
    if not isinstance(wrong, str):
        raise ValueError(f"documents must be text; {source} holds {wrong!r:.60}. Pass --column NAME.")
    kept = [text for text in texts if text]
    if not kept:
        raise ValueError(f"documents must hold text; {source} has {len(texts)} documents and no byte. Is it the file?")
    return Documents(kept, source)
