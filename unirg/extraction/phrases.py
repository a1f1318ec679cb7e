"""Phrase templates, and a word trie that finds the longest phrase at every word of a sentence.

A template is words with blanks between them; `a|b` is a choice and a final `?` makes a word optional:
`pleural? effusion|effusions` stands for four phrases. Hyphens never matter: "air-space" is read as "air space".
Scanning is one dictionary step a word, so that a sentence costs time linear in its length.
"""

import re
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

# A number, a word with an optional 's or n't, or a mark that matters to scope. Hyphens and all else separate words.
TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?|[,:;()/]")

Trie = dict[str, Any]
_END = ""  # no token is empty, so the empty key can hold a node's value


class Item(NamedTuple):
    """One phrase found: what kind it is, what it says, and the half-open range of tokens it covers."""

    kind: str
    value: Any
    first: int
    last: int


def expand(template: str) -> list[tuple[str, ...]]:
    """All word sequences that a template stands for."""
    choices = []
    for word in template.replace("-", " ").split():
        optional = word.endswith("?")
        options = word.rstrip("?").split("|")
        choices.append([*options, ""] if optional else options)
    return [tuple(word for word in combination if word) for combination in product(*choices)]


def add(trie: Trie, templates: Iterable[str], kind: str, value: Any) -> None:
    """Enter every phrase of `templates`. Raises ValueError where a phrase is already entered with another meaning."""
    for template in templates:
        for words in expand(template):
            node = trie
            for word in words:
                node = node.setdefault(word, {})
            if node.get(_END, (kind, value)) != (kind, value):
                raise ValueError(f"phrase {' '.join(words)!r} means {node[_END]} and {(kind, value)}")
            node[_END] = (kind, value)


def scan(words: list[str], trie: Trie) -> list[Item]:
    """The longest phrases from left to right, without overlap; words that start no phrase are left out."""
    items = []
    position, total = 0, len(words)
    while position < total:
        node = trie.get(words[position])
        found, end, ahead = None, position + 1, position + 1
        while node is not None:
            if _END in node:
                found, end = node[_END], ahead
            if ahead == total:
                break
            node = node.get(words[ahead])
            ahead += 1
        if found is not None:
            items.append(Item(found[0], found[1], position, end))
        position = end
    return items
