"""Recipes: one typed, documented tree of settings, read from YAML and changed by dotted overrides.

A recipe is the whole description of a run. Every default lives here and nowhere else; a key that does not exist, a
value of the wrong type and a NaN are errors, because a misspelt key that is silently ignored costs a training run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

# The sections are part of this module's interface: everybody imports them from here.
from .recipe_sections import (  # noqa: F401
    CheckpointRecipe,
    DataRecipe,
    EvaluationRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    RecipeError,
    RunRecipe,
    ScheduleRecipe,
    SourceRecipe,
    SparsityRecipe,
    TokenizerRecipe,
    TrackingRecipe,
    UserError,
)

# (field, lowest, highest, is the lowest itself allowed); the highest is never allowed. None = unbounded.
_RANGES = (
    ("run.seed", 0, 2**63, True),
    ("run.threads", 1, None, True),
    ("run.stop_on_spike", 0, None, False),
    ("data.tokenizer.vocab_size", 258, None, True),
    ("data.tokenizer.train_bytes", 1, None, True),
    ("data.workers", 0, None, True),
    ("data.sequence_length", 2, None, True),
    ("data.shuffle_block", 1, None, True),
    ("data.validation_fraction", 0, 1, True),
    ("data.validation_documents", 0, None, True),
    ("data.batch_size", 1, None, True),
    ("data.batch_tokens", 1, None, True),
    ("data.micro_batch_size", 1, None, True),
    ("optimizer.learning_rate", 0, None, False),
    ("optimizer.muon_learning_rate", 0, None, False),
    ("optimizer.muon_momentum", 0, 1, True),
    ("optimizer.beta1", 0, 1, True),
    ("optimizer.beta2", 0, 1, True),
    ("optimizer.epsilon", 0, None, False),
    ("optimizer.weight_decay", 0, None, True),
    ("optimizer.max_grad_norm", 0, None, True),
    ("optimizer.ema_decay", 0, 1, True),
    ("sparsity.final_sparsity", 0, 1, True),
    ("sparsity.start_fraction", 0, 1.0000001, True),
    ("sparsity.end_fraction", 0, 1.0000001, True),
    ("sparsity.every_steps", 1, None, True),
    ("sparsity.rigl_drop_fraction", 0, 1.0000001, False),
    ("schedule.steps", 1, None, True),
    ("schedule.warmup_steps", 0, None, True),
    ("schedule.final_fraction", 0, 1.0000001, True),
    ("schedule.decay_fraction", 0, 1.0000001, False),
    ("evaluation.every_steps", 0, None, True),
    ("evaluation.batch_size", 1, None, True),
    ("evaluation.sequence_length", 2, None, True),
    ("evaluation.overlap", 0, None, True),
    ("evaluation.max_documents", 1, None, True),
    ("checkpoint.every_steps", 0, None, True),
    ("checkpoint.keep_last", 1, None, True),
    ("tracking.log_every_steps", 1, None, True),
)

# Fields that a resumed run may change freely: they move the work to another place, not to another result.
_FREE_ON_RESUME = {
    "data.batch_tokens",  # data.batch_size is what it says
    "data.cache_dir",
    "data.micro_batch_size",
    "data.verify_shards",
    "data.workers",
    "model.attn_implementation",
}
_CHECKED_ON_RESUME = ("run.seed", "model", "data", "optimizer", "sparsity")


def load_recipe(path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides and check everything.

    Args:
        path: YAML file, or None for the defaults.
        overrides: `--section.field value` pairs, `--section.field=value` or `section.field=value`, in order; a later
            one wins. Values are read as YAML.

    Raises:
        RecipeError: Missing file, unknown key (with the nearest existing one), wrong type, NaN or value out of range.
    """
    tree = _read_yaml(path) if path is not None else {}
    for key, text in parse_overrides(overrides):
        _set_dotted(tree, key, _parse_scalar(text, key))
    recipe = recipe_from_dict(tree)
    return recipe


def recipe_from_dict(tree: dict[str, Any]) -> Recipe:
    """Build a checked `Recipe` from nested dicts, as YAML gives them."""
    recipe = _build(Recipe, tree, "")
    _count_rows(recipe.data)
    _validate(recipe)
    return recipe


def _count_rows(data: DataRecipe) -> None:
    """`batch_tokens` in rows; it wins over a `batch_size` beside it, which a saved recipe has too."""
    if data.batch_tokens is None or data.sequence_length < 1:
        return
    rows, rest = divmod(data.batch_tokens, data.sequence_length)
    if rows < 1 or rest:
        nearest_rows = max(1, round(data.batch_tokens / data.sequence_length))
        raise RecipeError(
            f"data.batch_tokens must be a multiple of data.sequence_length {data.sequence_length}; got "
            f"{data.batch_tokens}. Take {nearest_rows} x {data.sequence_length} = "
            f"{nearest_rows * data.sequence_length}."
        )
    data.batch_size = rows


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts of plain values, with every default written out."""
    return dataclasses.asdict(recipe)


def save_recipe(recipe: Recipe, path: str | os.PathLike) -> None:
    """Write the resolved recipe as YAML; `load_recipe` gives the same recipe back."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def parse_overrides(arguments: list[str] | tuple[str, ...]) -> list[tuple[str, str]]:
    """Split `--a.b 1`, `--a.b=1` and `a.b=1` into (key, text) pairs.

    Raises:
        RecipeError: If an argument is none of these or has no value.
    """
    pairs = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        key = argument.removeprefix("--")
        position += 1
        if "=" in key:
            key, _, text = key.partition("=")
        elif argument.startswith("--") and position < len(arguments) and not arguments[position].startswith("--"):
            text = arguments[position]
            position += 1
        elif argument.startswith("--"):
            raise RecipeError(f"{argument} has no value. Write {argument} VALUE.")
        else:
            raise RecipeError(f"{argument!r} is no override. Write --section.field VALUE or section.field=VALUE.")
        pairs.append((key, text))
    return pairs


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each setting but those of the schedule that changes what a resumed run computes."""
    # A section that is younger than the checkpoint had its defaults then.
    flat_old, flat_new = _flatten(recipe_to_dict(Recipe()) | old), _flatten(new)
    lines = []
    for key in sorted(set(flat_old) | set(flat_new)):
        is_checked = key in _CHECKED_ON_RESUME or key.partition(".")[0] in _CHECKED_ON_RESUME
        if not is_checked or key in _FREE_ON_RESUME:
            continue
        before, after = flat_old.get(key, "absent"), flat_new.get(key, "absent")
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def summary(recipe: Recipe) -> str:
    """The settings that differ from the defaults, one section a line."""
    default = _flatten(recipe_to_dict(Recipe()))
    lines = []
    for section in dataclasses.fields(Recipe):
        values = _flatten(dataclasses.asdict(getattr(recipe, section.name)))
        shown = [f"{k}={v}" for k, v in values.items() if default.get(f"{section.name}.{k}", "absent") != v]
        if shown:
            lines.append(textwrap.fill(f"{section.name:<11}" + " ".join(shown), 119, subsequent_indent=" " * 11))
    return "\n".join(lines)


def nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """`. Did you mean X?`, with `prefix` before it, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean {prefix}{close[0]}?" if close else f". Known: {', '.join(known)}."


def is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def inner_type(hint: Any) -> Any:
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))


def _read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path(".")
        beside = [p.name for p in folder.glob("*.yaml")]
        hint = nearest(path.name, beside) if beside else ""
        raise RecipeError(f"recipe {path} does not exist" + (hint or "."))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is no valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path} must hold sections such as `data:`; got {type(tree).__name__}.")
    return tree


def _parse_scalar(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError as error:
        raise RecipeError(f"{key} has a value that is no valid YAML: {text!r}.") from error


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise RecipeError(f"{key} does not exist: {'.'.join(parts[: depth + 1])} is a value, not a section.")
        tree = below
    tree[parts[-1]] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise RecipeError(f"{prefix or 'recipe'} must be a section with fields; got {tree!r}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            # Compared without the section, which all have in common: `optimizer.lr` is not close to `optimizer.name`.
            raise RecipeError(f"unknown recipe key {name}{nearest(str(key), hints, f'{prefix}.' if prefix else '')}")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], {} if value is None else value, name)
        else:
            values[key] = _convert(value, hints[key], name)
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    if is_optional(hint):
        return None if value is None else _convert(value, inner_type(hint), name)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise RecipeError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        return value
    if origin is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise RecipeError(f"{name} must be a list such as [a, b]; got {value!r}.")
        kind = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(kind):
            return [_build(kind, item, f"{name}[{number}]") for number, item in enumerate(items)]
        return [_convert(item, kind, name) for item in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{name} must be a section of NAME: VALUE lines; got {value!r}.")
        return {str(k): _refuse_nan(_number_if_numeric(v), f"{name}.{k}") for k, v in value.items()}
    return _convert_scalar(value, hint, name)


def _convert_scalar(value: Any, kind: type, name: str) -> Any:
    if kind is str:
        if isinstance(value, (bool, dict, list)) or value is None:
            raise RecipeError(f"{name} must be text; got {value!r}.")
        if value == "":
            raise RecipeError(f"{name} must not be empty. Leave it out, or write null where that is allowed.")
        return str(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise RecipeError(f"{name} must be true or false; got {value!r}.")
        return value
    number = _number_if_numeric(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise RecipeError(f"{name} must be {'an integer' if kind is int else 'a number'}; got {value!r}.")
    _refuse_nan(number, name)
    if kind is int and number != int(number):
        raise RecipeError(f"{name} must be an integer; got {value!r}.")
    return kind(number)


def _number_if_numeric(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, because it has no point; everybody who writes it means the number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _refuse_nan(value: Any, name: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name} must be a finite number; got {value}.")
    return value


def get_dotted(recipe: Recipe, key: str) -> Any:
    """Value of `section.field`."""
    value = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _validate(recipe: Recipe) -> None:
    for key, low, high, closed in _RANGES:
        value = get_dotted(recipe, key)
        if value is None:
            continue
        if value < low or (value == low and not closed) or (high is not None and value >= high):
            bounds = f"{'at least' if closed else 'above'} {low}" + (f" and below {round(high, 3)}" if high else "")
            raise RecipeError(f"{key} must be {bounds}; got {value}.")
    data, tokenizer = recipe.data, recipe.data.tokenizer
    if tokenizer.kind == "hub" and not tokenizer.path:
        raise RecipeError("data.tokenizer.path must name a tokenizer when data.tokenizer.kind is hub; got nothing.")
    _validate_sources(data)
    micro = data.micro_batch_size
    if micro is not None and data.batch_size % micro:
        raise RecipeError(
            f"data.batch_size must be a multiple of data.micro_batch_size {micro}; got {data.batch_size}."
        )
    _validate_split(recipe)
    length = recipe.evaluation.sequence_length or data.sequence_length
    if recipe.evaluation.overlap >= length - 1:
        raise RecipeError(
            f"evaluation.overlap must be below the row length {length} - 1; got {recipe.evaluation.overlap}."
        )


def _validate_sources(data: DataRecipe) -> None:
    _validate_path(data, "data")
    for number, part in enumerate(data.mixture):
        name = f"data.mixture[{number}]"
        _validate_path(part, name)
        if not part.weight > 0:
            raise RecipeError(f"{name}.weight must be above 0; got {part.weight}. Leave the source out instead.")
    if (data.source == "mixture") != bool(data.mixture):
        raise RecipeError(
            f"data.mixture lists the sources of data.source mixture; got {len(data.mixture)} with {data.source}."
        )
    kinds = {part.source == "shards" for part in data.mixture}
    if len(kinds) > 1:
        raise RecipeError("data.mixture must be of shards only, or without any: prepare all sources, or none.")
    if data.validation_packages and data.source not in ("python", "shards"):
        raise RecipeError(f"data.validation_packages needs data.source python; got {data.source}.")
    if data.exclude_shards and not reads_shards(data):
        raise RecipeError(f"data.exclude_shards needs data.source shards; got {data.source}.")


def _validate_path(part: DataRecipe | SourceRecipe, name: str) -> None:
    needed = part.source in ("local", "hub", "shards")
    if needed and not part.path:
        raise RecipeError(f"{name}.path must name the data when {name}.source is {part.source}; got nothing.")
    if not needed and part.path:
        raise RecipeError(
            f"{name}.path is only read with {name}.source local, hub or shards; got {part.path} with {part.source}."
        )


def reads_shards(data: DataRecipe) -> bool:
    """Whether the tokens come from folders that `prepare` wrote."""
    return data.source == "shards" or any(part.source == "shards" for part in data.mixture)


def _validate_split(recipe: Recipe) -> None:
    data = recipe.data
    ways = {
        "data.validation_ids": bool(data.validation_ids),
        "data.validation_fraction": data.validation_fraction > 0,
        "data.validation_split": data.validation_split is not None,
        "data.validation_documents": data.validation_documents > 0,
        "data.validation_packages": bool(data.validation_packages),
    }
    chosen = [name for name, on in ways.items() if on]
    if len(chosen) > 1:
        raise RecipeError(f"only one way to hold out data may be set; got {' and '.join(chosen)}.")
    sources = [part.source for part in data.mixture] or [data.source]
    if reads_shards(data):
        # A recipe that streams text takes its prepared shards without being changed.
        data.streaming = False
    if data.streaming and not set(sources) <= {"local", "hub"}:
        raise RecipeError(f"data.streaming needs data.source local or hub; got {', '.join(sources)}.")
    if data.mixture and (data.validation_ids or data.validation_split is not None or data.join_documents):
        raise RecipeError(
            "data.mixture holds out by data.validation_fraction or data.validation_documents of each source, and "
            "joins none. Leave data.validation_ids, data.validation_split and data.join_documents out."
        )
    if data.streaming and chosen and chosen[0] in ("data.validation_ids", "data.validation_fraction"):
        raise RecipeError(f"data.streaming cannot hold out by {chosen[0]}. Use data.validation_split or _documents.")
    if data.streaming and (data.join_documents or data.tokenizer.kind in ("char", "bpe")):
        raise RecipeError(
            "data.streaming reads the text once: set data.join_documents false and a byte or hub tokenizer."
        )
    if recipe.checkpoint.export == "best" and not chosen and not reads_shards(data):
        raise RecipeError("checkpoint.export best needs validation data: set one of " + ", ".join(ways) + ".")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
