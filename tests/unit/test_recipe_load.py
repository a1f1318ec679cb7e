"""Recipes: inheritance, overrides, and errors that say where."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from unirg.recipe.docs import recipe_docs
from unirg.recipe.fields import keys_at
from unirg.recipe.load import RecipeError, dump_recipe, load
from unirg.section import Section


class Files(Section):
    """Studies from files."""

    adapter: Literal["files"]
    """Studies from files."""
    path: str
    """Where they lie."""
    limit: int | None = None
    """How many to read."""


class Drawn(Section):
    """Drawn studies."""

    adapter: Literal["drawn"]
    """Drawn studies."""
    count: int = Field(3, gt=0)
    """How many to draw."""


Data = Annotated[Files | Drawn, Field(discriminator="adapter")]


class Optimiser(Section):
    """How weights are moved."""

    learning_rate: float
    """Step size."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """How it changes."""


class Warm(Section):
    """A warm start."""

    kind: Literal["warm"]
    """A warm start."""
    name: str
    """Its name."""
    steps: int = 5
    """How long."""
    optimiser: Optimiser
    """How weights are moved."""
    data: Data | None = None
    """Its own data."""


class Search(Section):
    """A search."""

    kind: Literal["search"]
    """A search."""
    name: str
    """Its name."""
    steps: int = 5
    """How long."""
    options: dict[str, Any] = {}
    """Anything | everything."""
    data: Data | None = None
    """Its own data."""


class Toy(Section):
    """A recipe with all the shapes that the real one has."""

    name: str
    """Its name."""
    output: str = "runs/${name}"
    """Where it goes."""
    data: Data
    """The data."""
    stages: list[Annotated[Warm | Search, Field(discriminator="kind")]]
    """The stages."""


BASE = """\
name: base
data:
  adapter: files
  path: studies.jsonl
stages:
  - {name: warm, kind: warm, optimiser: {learning_rate: 1e-6}}
  - name: search
    kind: search
    data:
      limit: 4
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def complaints(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load(path, overrides, Toy)
    return str(raised.value).replace(str(path.parent) + "/", "").splitlines()


def test_base_chain_merges_mappings_and_replaces_lists(write) -> None:
    write("base.yaml", BASE)
    write("middle.yaml", "base: base.yaml\nname: middle\ndata: {limit: 7}\n")
    path = write("leaf.yaml", "base: middle.yaml\nstages: [{name: only, kind: search, steps: 1}]\n")
    recipe = load(path, (), Toy)
    assert recipe.name == "middle" and recipe.output == "runs/middle"
    assert recipe.data == Files(adapter="files", path="studies.jsonl", limit=7)
    assert [stage.name for stage in recipe.stages] == ["only"]


def test_base_is_relative_to_the_file_that_names_it(write, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write("base.yaml", BASE)
    assert load(write("deep/leaf.yaml", "base: ../base.yaml\n"), (), Toy).name == "base"


def test_cycle_is_an_error_that_shows_the_circle(write) -> None:
    write("a.yaml", "name: a\nbase: b.yaml\n")
    path = write("b.yaml", "base: a.yaml\n")
    assert complaints(path) == ["a.yaml:2: base: a recipe cannot inherit from itself: b.yaml -> a.yaml -> b.yaml"]


def test_missing_base_names_the_line(write) -> None:
    assert complaints(write("a.yaml", "name: a\nbase: no.yaml\n")) == ["a.yaml:2: base: there is no file no.yaml"]


def test_number_without_a_point_is_a_number(write) -> None:
    path = write("a.yaml", BASE)
    assert load(path, (), Toy).stages[0].optimiser.learning_rate == 1e-6
    assert load(path, ["stages.warm.optimiser.learning_rate=5e-7"], Toy).stages[0].optimiser.learning_rate == 5e-7


def test_interpolation_sees_overrides(write) -> None:
    path = write("a.yaml", BASE.replace("studies.jsonl", "${name}.jsonl"))
    recipe = load(path, ["name=mine", "data.limit=${stages.0.steps}", "stages.warm.steps=9"], Toy)
    assert (recipe.data.path, recipe.data.limit, recipe.output) == ("mine.jsonl", 9, "runs/mine")


@pytest.mark.parametrize("key", ["stages.search.steps", "stages.1.steps"])
def test_stages_are_set_by_name_and_by_position(write, key: str) -> None:
    recipe = load(write("a.yaml", BASE), [f"{key}=11"], Toy)
    assert [stage.steps for stage in recipe.stages] == [5, 11]


def test_items_that_share_a_name_go_by_position(write) -> None:
    """Setting the first of two by their common name would be a guess."""
    path = write("a.yaml", BASE.replace("name: search", "name: warm"))
    assert complaints(path, "stages.warm.steps=1") == [
        "override 'stages.warm.steps=1': stages has no item 'warm'; known here: 0, 1"
    ]
    assert [stage.steps for stage in load(path, ["stages.1.steps=1"], Toy).stages] == [5, 1]


def test_stage_data_is_laid_over_the_recipes(write) -> None:
    path = write("a.yaml", BASE)
    warm, search = load(path, ["data.path=other.jsonl"], Toy).stages
    assert warm.data is None
    assert search.data == Files(adapter="files", path="other.jsonl", limit=4)


def test_stage_data_with_another_adapter_stands_alone(write) -> None:
    path = write("a.yaml", BASE.replace("limit: 4", "adapter: drawn"))
    assert load(path, (), Toy).stages[1].data == Drawn(adapter="drawn")


def test_all_errors_come_at_once_with_file_line_key_and_nearest(write) -> None:
    write(
        "base.yaml", BASE.replace("path:", "limt: 3\n  path:").replace("kind: search", "kind: search\n    steps: ten")
    )
    path = write("leaf.yaml", "base: base.yaml\n\nnam: x\n")
    assert complaints(path, "stages.warm.optimiser.schedule=cosin", "stages.warm.steps=true") == [
        "base.yaml:4: data.limt: unknown key; did you mean 'limit'?",
        "override 'stages.warm.steps=true': stages.warm.steps: expected a valid integer, got True",
        "override 'stages.warm.optimiser.schedule=cosin': stages.warm.optimiser.schedule: "
        "expected 'constant' or 'cosine', got 'cosin'; did you mean 'cosine'?",
        "base.yaml:10: stages.search.steps: expected a valid integer, got 'ten'",
        "leaf.yaml:3: nam: unknown key; did you mean 'name'?",
    ]


def test_value_set_twice_is_wrong_where_it_was_set_last(write) -> None:
    write("base.yaml", BASE)
    path = write("leaf.yaml", "base: base.yaml\ndata:\n  path: 3\n")
    assert complaints(path) == ["leaf.yaml:3: data.path: expected a valid string, got 3"]


def test_what_a_list_replaced_is_not_blamed(write) -> None:
    """The base's second stage has `kind` on line 8; the leaf's own second stage, which lacks it, is what is wrong."""
    write("base.yaml", BASE)
    path = write("leaf.yaml", "base: base.yaml\nstages:\n  - {name: a, kind: search}\n  - {name: b}\n")
    assert complaints(path) == ["leaf.yaml:4: stages.b.kind: this key is needed, and is not there"]


def test_wrong_tag_and_missing_key(write) -> None:
    path = write("a.yaml", BASE.replace("  path: studies.jsonl\n", "").replace("kind: search", "kind: serch"))
    assert complaints(path) == [
        "a.yaml:2: data.path: this key is needed, and is not there",
        "a.yaml:7: stages.search.kind: expected 'warm', 'search', got 'serch'; did you mean 'search'?",
    ]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps", "override 'steps': expected key=value, such as stages.grpo.steps=10"),
        ("stages.serch.steps=1", "override 'stages.serch.steps=1': stages has no item 'serch'; did you mean 'search'?"),
        ("stages.2.steps=1", "override 'stages.2.steps=1': stages has no item '2'; known here: warm, search"),
        ("name.x=1", "override 'name.x=1': name is 'base', which has no key 'x'"),
        ("name=${nme}", "override 'name=${nme}': name: Interpolation key 'nme' not found"),
        ("name=${oc.env:NO_ONE}", "override 'name=${oc.env:NO_ONE}': name: Environment variable 'NO_ONE' not found"),
        ("data.limit=${x", "override 'data.limit=${x': "),
        ("data.limit={", "override 'data.limit={': "),
    ],
)
def test_override_errors_name_the_override(write, override: str, complaint: str) -> None:
    (line,) = complaints(write("a.yaml", BASE), override)
    assert line.startswith(complaint)


def test_unset_name_is_reported_as_such_although_a_default_refers_to_it(write) -> None:
    assert complaints(write("a.yaml", BASE.replace("name: base\n", ""))) == [
        "a.yaml:1: name: this key is needed, and is not there"
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: a\nname: b\n", "a.yaml:2: not valid YAML: found duplicate key"),
        ("name: [a\n", "a.yaml:2: not valid YAML: expected ',' or ']'"),
        ("- a\n", "a.yaml:1: expected a mapping"),
        ("just text\n", "a.yaml:1: expected a mapping"),
        ("name: a\nbase: [b.yaml]\n", "a.yaml:2: base: expected the path of one recipe"),
        ("name: !!python/object:os.system x\n", "a.yaml:1: not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(write, text: str, complaint: str) -> None:
    assert complaints(write("a.yaml", text))[0].startswith(complaint)


def test_unreadable_files(write, tmp_path: Path) -> None:
    assert "No such file" in complaints(tmp_path / "no.yaml")[0]
    assert "Is a directory" in complaints(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "UTF-8" in complaints(tmp_path / "latin.yaml")[0]
    assert "this key is needed" in complaints(write("empty.yaml", "# nothing\n"))[0]


texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="$"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(name=texts, options=st.dictionaries(texts, texts | st.integers() | st.floats(allow_nan=False) | st.booleans()))
def test_dump_reads_back(name: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also texts that look like numbers, booleans, nulls or dates."""
    recipe = Toy(
        name=name or "x",
        data=Drawn(adapter="drawn"),
        output="o",
        stages=[
            Search(kind="search", name="s", options=options),
            Warm(kind="warm", name="1e-6", optimiser=Optimiser(learning_rate=1e-6)),
        ],
    )
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load(path, (), Toy) == recipe


def test_keys_at_follows_tags_lists_and_mappings() -> None:
    assert keys_at(Toy, ()) == ["name", "output", "data", "stages"]
    assert keys_at(Toy, ("data", "drawn")) == ["adapter", "count"]
    assert keys_at(Toy, ("stages", 1, "warm", "optimiser")) == ["learning_rate", "schedule"]
    assert keys_at(Toy, ("stages", 0, "search", "options", "deep")) == []


def test_docs_hold_every_section_once_with_type_default_and_meaning() -> None:
    page = recipe_docs(Toy)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Toy",
        "## Files",
        "## Drawn",
        "## Warm",
        "## Search",
        "## Optimiser",
    ]
    assert "| `data` | [Files](#files) or [Drawn](#drawn) | needed | The data. |" in page
    assert "| `stages` | list of [Warm](#warm) or [Search](#search) | needed | The stages. |" in page
    assert "| `count` | integer, > 0 | `3` | How many to draw. |" in page
    assert "| `schedule` | `constant` or `cosine` | `cosine` | How it changes. |" in page
    assert "| `limit` | integer or null | null | How many to read. |" in page
    assert "| `options` | mapping to anything | `{}` | Anything \\| everything. |" in page
    assert "Chosen by `adapter: drawn`." in page


def test_docs_refuse_a_key_without_a_docstring() -> None:
    class Bare(Section):
        """Has a key that says nothing."""

        key: int

    with pytest.raises(ValueError, match=r"Bare\.key has no docstring"):
        recipe_docs(Bare)
