"""The Python source of the packages that are installed on this machine, as a corpus of real text without a network."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MIN_BYTES = 200
"""Shorter files are empty `__init__.py` and the like."""


def roots() -> list[Path]:
    """Folders of installed packages, and the standard library."""
    found = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [*dict.fromkeys(path for path in (*found, Path(sysconfig.get_path("stdlib"))) if path.is_dir())]


def python_files(folders: list[Path] | None = None) -> Iterator[tuple[str, str]]:
    """Name and text of each `.py` file, in order of names; a text that occurs twice is given once.

    Files below 200 bytes and files that are no UTF-8 are left out. The licences are those of the packages: train on
    the text, don't pass it on.

    Args:
        folders: Where to look; None takes `roots()`.

    Returns:
        Pairs of `package/path/in/it.py` and the text.
    """
    places: dict[str, Path] = {}
    for root in roots() if folders is None else folders:
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            # The standard library's folder often holds site-packages.
            if not {"site-packages", "dist-packages", "__pycache__"} & set(inside.parts[:-1]):
                places.setdefault(inside.as_posix(), path)
    seen = set()
    names = sorted(places)
    # Threads: a cold disk answers many small reads at once.
    with ThreadPoolExecutor(16) as pool:
        contents = list(pool.map(_read, (places[name] for name in names)))
    for name, content in zip(names, contents, strict=True):
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(content).digest()
        if len(content) >= MIN_BYTES and digest not in seen:
            seen.add(digest)
            yield name, text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def package_of(name: str) -> str:
    """Top-level package or module of a file."""
    return name.split("/")[0].removesuffix(".py")
