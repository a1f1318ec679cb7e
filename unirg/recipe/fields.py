"""What may stand under a key of a recipe, read from the types of its sections."""

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel


def members(annotation: Any) -> list[Any]:
    """The types that an annotation allows: `Annotated` is unwrapped, unions are taken apart, None stays NoneType."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in members(part)]
    return [annotation]


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections among `members`, also those that stand in a list, a tuple or a mapping."""
    found: list[type[BaseModel]] = []
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
        elif typing.get_origin(member) in (list, tuple, dict):
            found += [section for part in typing.get_args(member) for section in sections(part)]
    return found


def tag(section: type[BaseModel]) -> tuple[str, str] | None:
    """The key and value that tell this section from others of its union: its one required `Literal` field of one value,
    such as ("kind", "sft"); None where it has no such field."""
    for name, field in section.model_fields.items():
        values = typing.get_args(field.annotation)
        if typing.get_origin(field.annotation) is Literal and len(values) == 1 and isinstance(values[0], str):
            return name, values[0]
    return None


def keys_at(root: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The keys known at a pydantic error location (which also holds the tags and class names of a union's members)."""
    here: list[Any] = [root]
    for part in location:
        there: list[Any] = []
        for kind in here:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                own_tag = tag(kind)
                if len(here) > 1 and (part == kind.__name__ or (own_tag and part == own_tag[1])):
                    there.append(kind)
                elif part in kind.model_fields:
                    there += members(kind.model_fields[str(part)].annotation)
            elif typing.get_origin(kind) in (list, tuple, dict):
                there += members(typing.get_args(kind)[-1 if typing.get_origin(kind) is dict else 0])
        here = there
    return [
        name for kind in here if isinstance(kind, type) and issubclass(kind, BaseModel) for name in kind.model_fields
    ]
