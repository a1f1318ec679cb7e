"""Recipes, the YAML that runs are made from: `schema` says what may stand in one, `load` reads, `docs` describes."""
