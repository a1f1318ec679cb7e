"""The recipe reference: a Markdown page made from the sections' field docstrings, their only source."""

import typing
from collections.abc import Iterator
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from unirg.recipe.fields import members, sections, tag

HEAD = """\
# What a recipe may say

Made by `unirg recipe docs` from the docstrings of the code; do not edit by hand.

A recipe is a YAML file. `base: other.yaml` (relative to the file) takes over all that another recipe says: mappings
merge key by key, lists and plain values replace. `${key.other}` stands for another key's value. On the command line
`key.other=value` sets one key, and an item of a list goes by its `name` or position: `stages.grpo.steps=10`. Unknown
keys and wrong types are errors.
"""


def recipe_docs(model: type[BaseModel]) -> str:
    """The reference page of `model` and of all sections that it reaches, each once, in the order of first mention."""
    return "\n".join([HEAD, *(part for section in _reached(model) for part in _describe(section))])


def _reached(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for section in found:  # grows while it is read
        for field in section.model_fields.values():
            found += [other for other in dict.fromkeys(sections(field.annotation)) if other not in found]
    return found


def _describe(section: type[BaseModel]) -> Iterator[str]:
    own_tag = tag(section)
    yield f"## {_title(section)}\n"
    yield _one_line(section.__doc__) + "\n"
    if own_tag:
        yield f"Chosen by `{own_tag[0]}: {own_tag[1]}`.\n"
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in section.model_fields.items():
        meaning = _one_line(field.description)
        if not meaning:
            raise ValueError(f"{section.__name__}.{name} has no docstring: write one under the field")
        cells = [f"`{name}`", _type(field), _default(field), meaning]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _title(section: type[BaseModel]) -> str:
    return section.__name__.removesuffix("Config")


def _type(field: FieldInfo) -> str:
    limits = [_limit(item) for item in field.metadata]
    return ", ".join([_name(field.annotation), *filter(None, limits)])


def _name(annotation: Any) -> str:
    """The type in words: `list of [Sft](#sft) or [Grpo](#grpo)`."""
    names = []
    for member in members(annotation):
        origin, parts = typing.get_origin(member), typing.get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel):
            names.append(f"[{_title(member)}](#{_title(member).lower()})")
        elif origin is Literal:
            names += [f"`{value}`" for value in parts]
        elif origin in (list, tuple):
            names.append(f"list of {' or '.join(dict.fromkeys(_name(part) for part in parts if part is not ...))}")
        elif origin is dict:
            names.append(f"mapping to {_name(parts[1])}")
        elif member is Any:
            names.append("anything")
        elif member is type(None):
            names.append("null")
        else:
            words = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
            names.append(words.get(member.__name__, member.__name__))
    return " or ".join(dict.fromkeys(names))


def _limit(item: Any) -> str:
    match item:
        case annotated_types.Gt(gt=value):
            return f"> {value}"
        case annotated_types.Ge(ge=value):
            return f">= {value}"
        case annotated_types.Lt(lt=value):
            return f"< {value}"
        case annotated_types.Le(le=value):
            return f"<= {value}"
        case annotated_types.MinLen(min_length=value):
            return f"at least {value}"
    return ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, BaseModel):
        return "as listed there"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value!r}`" if isinstance(value, list | tuple | dict) or value == "" else f"`{value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
