"""`unirg recipe`: show a resolved recipe, check recipes, write the reference page."""

import sys
from collections.abc import Sequence
from pathlib import Path

from unirg.recipe.docs import recipe_docs
from unirg.recipe.load import RecipeError, dump_recipe, load_recipe
from unirg.recipe.schema import Recipe


def show(path: Path, overrides: Sequence[str]) -> int:
    """Prints the resolved recipe. Raises RecipeError."""
    print(dump_recipe(load_recipe(path, overrides)), end="")
    return 0


def check(paths: Sequence[Path]) -> int:
    """Validates recipes, and in folders every `*.yaml` below. Prints a line for each; 2 where any is wrong."""
    files = [file for path in paths for file in (sorted(path.rglob("*.yaml")) if path.is_dir() else [path])]
    if not files:
        raise RecipeError(f"no *.yaml under {', '.join(map(str, paths))}")
    wrong = 0
    for file in files:
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            wrong += 1
            print(error, file=sys.stderr)
        else:
            print(f"{file}: ok ({', '.join(stage.name for stage in recipe.stages)})")
    return 2 if wrong else 0


def docs(page: Path, only_check: bool) -> int:
    """Writes the reference page; or, with `only_check`, returns 1 where the page is not what would be written."""
    text = recipe_docs(Recipe)
    if not only_check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        print(page)
        return 0
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"{page}: out of date; write it anew with `unirg recipe docs`", file=sys.stderr)
        return 1
    return 0
