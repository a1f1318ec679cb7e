"""Read a recipe: YAML with `base:` inheritance, `${}` interpolation and `a.b=c` overrides, validated into types.

The order: the base chain is merged (mappings merge deeply, lists and scalars replace), overrides are set,
interpolations are resolved, each stage's `data:` is laid over the recipe's own, and the result is validated, strictly:
"10" is not a number and true is not 1. All that is wrong is reported at once, each with the place where it was written.
"""

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from unirg.errors import UserError
from unirg.recipe.fields import keys_at

if TYPE_CHECKING:
    from unirg.recipe.schema import Recipe

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str | int, ...]


class RecipeError(UserError):
    """A recipe that cannot be used: one line for each thing that is wrong, naming file, line and dotted key."""


@dataclass(frozen=True)
class _File:
    """One file of a base chain: its values, and its YAML nodes for line numbers (None: an empty file)."""

    path: Path
    values: dict[str, Any]
    root: yaml.Node | None


@dataclass(frozen=True)
class _Override:
    """An override as given, and the key it set, stage names already turned into positions."""

    text: str
    key: Key


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> "Recipe":
    """The recipe in `path` with `overrides` ("stages.grpo.steps=10") set. Raises RecipeError."""
    from unirg.recipe.schema import Recipe  # reaches torch and transformers: not before it is needed

    return load(path, overrides, Recipe)


def load(path: Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """As `load_recipe`, into any pydantic model. Raises RecipeError."""
    files = list(_chain(path))
    tree = _plain(OmegaConf.merge(*(file.values for file in reversed(files))))
    applied = _apply_overrides(tree, overrides)
    try:
        tree = _plain(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = _parse_key(getattr(error, "full_key", None) or "")
        words = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        raise RecipeError(_line(_place(key, files, applied), tree, key, words)) from error
    _resolve_defaults(tree, model)
    _lay_stage_data(tree)
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, tree, files, applied, model))) from error


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


# Reading


def _chain(path: Path) -> Iterator[_File]:
    """The file, its base, the base's base, ..."""
    seen: list[Path] = []
    while True:
        seen.append(path)
        file = _read(path)
        base = file.values.pop("base", None)
        yield file
        if base is None:
            return
        here = f"{path}:{_line_of(('base',), file)[0]}: base"
        if not isinstance(base, str):
            raise RecipeError(f"{here}: expected the path of one recipe, relative to this file, got {base!r}")
        path = path.parent / base
        if not path.is_file():
            raise RecipeError(f"{here}: there is no file {path}")
        if any(path.samefile(earlier) for earlier in seen):
            circle = " -> ".join(str(p) for p in [*seen, path])
            raise RecipeError(f"{here}: a recipe cannot inherit from itself: {circle}")


def _read(path: Path) -> _File:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # OmegaConf's own loader reads 1e-6 as a number, which YAML 1.1 does not, and refuses a key given twice.
        values = _plain(OmegaConf.create(text)) if root is not None else {}
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}:1: expected a mapping (key: value), got {values!r:.60}")
    return _File(path, values, root)


def _plain(config: Any, **options: bool) -> Any:
    """An OmegaConf container as dicts and lists."""
    return OmegaConf.to_container(config, **options)  # type: ignore[arg-type]


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[_Override]:
    """Sets each override in `tree`. Raises RecipeError with one line for each that cannot be set."""
    applied, problems = [], []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        try:
            if not equals or not dotted:
                raise ValueError("expected key=value, such as stages.grpo.steps=10")
            parsed = _plain(OmegaConf.from_dotlist([f"value={value}"]))
            applied.append(_Override(text, _set(tree, dotted.split("."), parsed["value"])))
        except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"override '{text}': {str(error).splitlines()[0]}")
    if problems:
        raise RecipeError("\n".join(problems))
    return applied


def _set(tree: dict[str, Any], parts: list[str], value: Any) -> Key:
    """Sets the value at a dotted key, making mappings on the way; an item of a list goes by position or by name."""
    here: Any = tree
    key: list[str | int] = []
    for depth, part in enumerate(parts):
        step: str | int = part
        if isinstance(here, list):
            names = _names(here)
            if part in names:
                step = names.index(part)
            elif part.isdecimal() and int(part) < len(here):
                step = int(part)
            else:
                raise ValueError(f"{'.'.join(parts[:depth])} has no item '{part}'{_suggest(part, names)}")
        elif not isinstance(here, dict):
            raise ValueError(f"{'.'.join(parts[:depth])} is {here!r}, which has no key '{part}'")
        key.append(step)
        if depth == len(parts) - 1:
            here[step] = value
        elif isinstance(here, dict) and here.get(part) is None:
            here[step] = {}
        here = here[step]
    return tuple(key)


def _resolve_defaults(tree: dict[str, Any], model: type[BaseModel]) -> None:
    """Sets the defaults that refer to other keys ("runs/${name}"), where those keys are there."""
    for name, field in model.model_fields.items():
        if name not in tree and isinstance(field.default, str) and "${" in field.default:
            with contextlib.suppress(OmegaConfBaseException):  # validation will say which key is missing
                tree[name] = OmegaConf.create({**tree, name: field.default})[name]


def _names(items: list[Any]) -> list[str]:
    """What each item of a list is called: its name, or its position where it has none or shares it."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [str(i) if name is None or names.count(name) > 1 else str(name) for i, name in enumerate(names)]


def _lay_stage_data(tree: dict[str, Any]) -> None:
    """Completes each stage's `data:` from the recipe's own, unless it names another adapter."""
    data, stages = tree.get("data"), tree.get("stages")
    if not isinstance(data, dict) or not isinstance(stages, list):
        return
    for stage in stages:
        own = stage.get("data") if isinstance(stage, dict) else None
        if isinstance(own, dict) and own.get("adapter", data.get("adapter")) == data.get("adapter"):
            stage["data"] = _plain(OmegaConf.merge(data, own))


# Saying what is wrong, and where


def _explain(
    error: ValidationError, tree: dict[str, Any], files: list[_File], applied: list[_Override], model: type[BaseModel]
) -> list[str]:
    """One line for each thing wrong; what a union refuses for several reasons is one thing."""
    by_key: dict[Key, list[str]] = {}
    for detail in error.errors(include_url=False):
        key = _real_key(detail["loc"], tree)
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "extra_forbidden":
            text = "unknown key" + _suggest(str(key[-1]), keys_at(model, detail["loc"][:-1]))
        elif kind == "missing":
            text = "this key is needed, and is not there"
        elif kind == "union_tag_not_found":
            key = (*key, context["discriminator"].strip("'"))
            text = "this key is needed, and is not there"
        elif kind == "union_tag_invalid":
            key = (*key, context["discriminator"].strip("'"))
            text = f"expected {context['expected_tags']}, got {context['tag']!r}"
            text += _suggest(context["tag"], [tag.strip("' ") for tag in context["expected_tags"].split(",")], False)
        elif kind in ("value_error", "assertion_error"):
            text = str(context["error"])
        else:
            text = (
                detail["msg"].replace("Input should be", "expected").replace("an object", "a mapping")
                + f", got {_short(detail['input'])}"
            )
            if kind == "literal_error":
                options = context["expected"].replace(" or ", ",").split(",")
                text += _suggest(str(detail["input"]), [option.strip("' ") for option in options], False)
        if _is_inherited_data(key, files, applied):
            key = key[2:]
        texts = by_key.setdefault(key, [])
        if text not in texts:
            texts.append(text)
    return [_line(_place(key, files, applied), tree, key, "; or ".join(texts)) for key, texts in by_key.items()]


def _real_key(loc: tuple[str | int, ...], tree: Any) -> Key:
    """The key in the recipe of pydantic's `loc`, which also holds the names of a union's members."""
    key: list[str | int] = []
    here: Any = tree
    for depth, part in enumerate(loc):
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            key.append(part)
            here = here[part]  # type: ignore[index]
        elif depth == len(loc) - 1 and isinstance(here, dict):
            key.append(part)  # the key that is missing
    return tuple(key)


def _is_inherited_data(key: Key, files: list[_File], applied: list[_Override]) -> bool:
    """Whether what stands under a stage's data was written in the recipe's own data: then that is where it is wrong."""
    if len(key) < 4 or key[0] != "stages" or key[2] != "data":
        return False
    if any(override.key == key[: len(override.key)] and len(override.key) > 2 for override in applied):
        return False
    # A list replaces: only the first file of the chain with `stages` counts.
    stages = next((file for file in files if _line_of(("stages",), file)[1] == 1), None)
    return stages is None or _line_of(key, stages)[1] < len(key)


def _place(key: Key, files: list[_File], applied: list[_Override]) -> str:
    """Where a key was set: the override, or file and line; for a missing key where its nearest parent was."""
    for override in reversed(applied):
        if override.key == key[: len(override.key)]:
            return f"override '{override.text}'"
    best, best_depth = f"{files[0].path}:1", 0
    for file in files:
        line, depth, in_list = _line_of(key, file)
        if depth > best_depth:
            best, best_depth = f"{file.path}:{line}", depth
        if depth == len(key) or in_list:  # in a list: it replaced the base's, so the base has no say
            break
    return best


def _line_of(key: Key, file: _File) -> tuple[int, int, bool]:
    """(line of the deepest part of `key` that the file sets, how many parts that is, whether a list was entered)."""
    node, line, depth, in_list = file.root, 1, 0, False
    for part in key:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if getattr(k, "value", None) == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node, in_list = node.value[part], True
            line = node.start_mark.line + 1
        else:
            break
        depth += 1
    return line, depth, in_list


def _line(place: str, tree: Any, key: Key, text: str) -> str:
    """One line of an error. Items of a list that have a name go by it, as they do in overrides."""
    shown: list[str] = []
    here = tree
    for part in key:
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            shown.append(_names(here)[part])
            here = here[part]
        else:
            shown.append(str(part))
            here = here.get(part) if isinstance(here, dict) else None
    dotted = ".".join(shown)
    return ": ".join(filter(None, [place, dotted, text.removeprefix(f"{dotted}: ")]))


def _parse_key(dotted: str) -> Key:
    """OmegaConf's "stages[1].steps" as a key."""
    parts = dotted.replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts if part)


def _suggest(wrong: str, known: Sequence[str], list_known: bool = True) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known here: {', '.join(known)}" if known and list_known else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
