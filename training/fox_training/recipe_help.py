"""What `--help` says about the fields of a recipe, taken from their definitions."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from typing import Any, Literal

import yaml

from .recipe import Recipe, inner_type, is_optional


def describe_fields() -> str:
    """Every field with its type, default and meaning, for `--help`."""
    blocks = []
    for section in dataclasses.fields(Recipe):
        cls = typing.get_type_hints(Recipe)[section.name]
        blocks.append(cls.__doc__.splitlines()[0])
        blocks.extend(_describe_section(cls, section.name))
    return "\n".join(blocks)


def _describe_section(cls: type, prefix: str) -> list[str]:
    documentation = _field_docs(cls)
    lines = []
    for item in dataclasses.fields(cls):
        name = f"{prefix}.{item.name}"
        hint = typing.get_type_hints(cls)[item.name]
        if dataclasses.is_dataclass(hint):
            lines.extend(_describe_section(hint, name))
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        text = f"{documentation[item.name]} (default: {yaml_value(default)})"
        lines.append(f"  --{name} {_type_name(hint)}")
        lines.append(textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return lines


def _field_docs(cls: type) -> dict[str, str]:
    """The string below each field, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def yaml_value(value: Any) -> str:
    """A value as one would write it in a recipe."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if is_optional(hint):
        return _type_name(inner_type(hint))
    if typing.get_origin(hint) is list:
        return "[{...},...]" if dataclasses.is_dataclass(typing.get_args(hint)[0]) else "[TEXT,...]"
    if typing.get_origin(hint) is dict:
        return "{NAME: VALUE}"
    return {int: "N", float: "X", bool: "{true,false}", str: "TEXT"}[hint]
