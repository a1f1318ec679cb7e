"""Section: the base of every typed piece of a recipe."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values are frozen, field docstrings are its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",  # a saved recipe keeps an infinite limit, where JSON would make it null
    )
