"""Find a reward by name: an installed entry point, `path/to/file.py:function`, or `package.module:function`.

An entry point may also be a module that holds a family of rewards, one of which is named `entry_point:reward`.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from unirg.scoring.contract import (
    RewardConfig,
    RewardError,
    ScoreFunction,
    Terms,
    validated_scores,
    validated_terms,
)
from unirg.scoring.worker import described

GROUP = "unirg.rewards"
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Reward:
    """A reward ready to score, whichever of the contract's shapes it was written in.

    `written` is the function or the instance as its author wrote it, `function` what computes the scores.
    """

    name: str
    options: dict[str, Any]
    written: Any
    function: ScoreFunction

    def setup(self, device: str = "cpu") -> None:
        """Let the reward load what it needs. Call once, before the first score.

        Raises RewardError where another device than the CPU is asked of a reward whose `setup` takes none.
        """
        setup = getattr(self.written, "setup", None)
        if setup is not None and "device" in inspect.signature(setup).parameters:
            setup(device=device)
        elif device != "cpu":
            raise RewardError(f"reward '{self.name}' takes no device; leave `device: {device}` out")
        elif setup is not None:
            setup()

    @property
    def shares(self) -> tuple[str, ...]:
        """Rewards that have one of these names in common belong in one process: they share a model."""
        shares = getattr(self.written, "shares", None) or ()
        return (shares,) if isinstance(shares, str) else tuple(map(str, shares))

    @property
    def prepares(self) -> bool:
        """Whether it has a use for references before their candidates are there."""
        return hasattr(self.written, "prepare")

    def prepare(self, references: list[str]) -> None:
        """Let the reward read references of candidates to come. What it raises passes through."""
        self.written.prepare(references)

    @property
    def deduplicate(self) -> bool:
        """Whether identical candidates of one study may be scored once."""
        return bool(getattr(self.written, "deduplicate", True))

    @property
    def evaluation_only(self) -> str | None:
        """Why it must not be trained on, where its author says so."""
        return getattr(self.written, "evaluation_only", None)

    @property
    def identity(self) -> dict[str, Any]:
        """Name, options and what the reward says of itself."""
        return {"name": self.name, "options": self.options} | dict(getattr(self.written, "identity", None) or {})

    def score(self, candidates: list[str], references: list[str], **columns: Any) -> list[float | None]:
        """One finite number or None per candidate. A reward that takes no `**columns` gets those that it names.

        Raises RewardError where the reward asks for a column that is not there or breaks the contract; what the
        reward itself raises passes through.
        """
        returned = self.function(candidates, references, **self._taken(self.function, columns))
        return validated_scores(self.name, returned, _ids(candidates, columns))

    @property
    def has_corpus_terms(self) -> bool:
        """Whether it has figures of a corpus beside the mean of its scores."""
        return hasattr(self.written, "corpus_terms")

    def corpus_terms(self, candidates: list[str], references: list[str], **columns: Any) -> dict[str, list[Terms]]:
        """By figure, what each candidate adds to it (see the contract). Raises as `score` does."""
        method = self.written.corpus_terms
        returned = method(candidates, references, **self._taken(method, columns))
        return validated_terms(self.name, returned, _ids(candidates, columns))

    def _taken(self, function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
        """The columns that `function` is to be called with. Raises RewardError where one that it needs is missing."""
        parameters = list(inspect.signature(function).parameters.values())
        if isinstance(function, functools.partial):  # a function's option stands, though a column has its name
            columns = {name: values for name, values in columns.items() if name not in function.keywords}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            columns = {p.name: columns[p.name] for p in parameters if p.name in columns}
        for parameter in parameters[2:]:
            required = parameter.kind in _NAMED and parameter.default is inspect.Parameter.empty
            if required and parameter.name not in columns:
                raise RewardError(
                    f"reward '{self.name}' needs '{parameter.name}', which is neither a column of the data nor an "
                    "option given to it"
                )
        return columns


def _ids(candidates: list[str], columns: dict[str, Any]) -> list[str]:
    return [str(name) for name in columns.get("study_id", range(len(candidates)))]


@dataclass(frozen=True)
class InstalledReward:
    """An entry point as `unirg rewards` lists it: what it measures and needs, or why it cannot be loaded."""

    name: str
    package: str
    measures: str
    needs: str
    error: str | None = None


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward of that name with those options: classes are built with them, functions called with them.

    Raises RewardError: nothing of that name (with the nearest names), code that fails to import, an unknown option.
    """
    options = dict(options or {})
    written = _find(name)
    named = _option_names(name, written)
    for option in options:
        if option not in named:
            known = ", ".join(named) or "none"
            raise RewardError(f"reward '{name}' has no option '{option}'{_nearest(option, named)} (options: {known})")
    try:
        built = written(**options) if inspect.isclass(written) else written
    except RewardError:
        raise
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward '{name}' cannot be built with options {options}: {error}") from error
    except Exception as error:  # whatever its constructor raises
        raise RewardError(f"reward '{name}' cannot be built: {described(error)}") from error
    if hasattr(built, "score"):
        if options and not inspect.isclass(written):
            raise RewardError(f"reward '{name}' is an object already built; it takes no options")
        reward = Reward(name, options, built, built.score)
    elif callable(built):
        reward = Reward(name, options, built, functools.partial(built, **options))
    else:
        kind = type(built).__name__
        raise RewardError(f"reward '{name}' is of type {kind}, expected a function or a class with a `score` method")
    kinds = [parameter.kind for parameter in inspect.signature(reward.function).parameters.values()]
    lists = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if lists < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise RewardError(f"reward '{name}' takes {lists} positional arguments, expected (candidates, references)")
    return reward


def check_trainable(configs: Iterable[RewardConfig]) -> None:
    """Raises RewardError for the first reward of a training stage whose author says that it is for evaluation only."""
    from unirg.scoring.client import ServedReward  # here alone: workers load rewards too, and need no HTTP

    for config in configs:
        if config.server is None:
            reason = load_reward(config.name, config.options).evaluation_only
        else:
            with contextlib.closing(ServedReward(config)) as served:
                reason = served.evaluation_only
        if reason:
            raise RewardError(
                f"reward '{config.log_label}' is for evaluation only: {reason}; name it in evaluation.metrics instead"
            )


def installed() -> list[InstalledReward]:
    """Every installed reward, by name. One that cannot be imported is listed with its error."""
    rewards = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package = point.dist.name if point.dist else "?"
        try:
            written = point.load()
        except Exception as error:  # a broken plug-in must not hide the others
            rewards.append(InstalledReward(point.name, package, "", "", f"{type(error).__name__}: {error}"))
            continue
        first_line = (inspect.getdoc(written) or "").partition("\n")[0]
        rewards.append(InstalledReward(point.name, package, first_line, str(getattr(written, "needs", ""))))
    return rewards


def _find(name: str) -> Any:
    """The object that `name` names, imported."""
    where, colon, attribute = name.rpartition(":")
    if not colon and name.endswith(".py"):
        raise RewardError(f"reward '{name}' names a file; name its function too, as {name}:FUNCTION")
    if not colon:
        return _load_entry_point(name)
    if where.endswith(".py") and not (file := Path(where).expanduser()).is_file():
        raise RewardError(f"reward '{name}': there is no file {file.absolute()}")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    except RewardError:
        raise
    except Exception as error:  # whatever the module's own code raises
        hint = f"; a file is named {where}.py:{attribute}" if Path(f"{where}.py").is_file() else ""
        raise RewardError(f"reward '{name}': {where} cannot be imported: {described(error)}{hint}") from error
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"reward '{name}': {where} has no '{attribute}'{_nearest(attribute, functions)}")
    return getattr(module, attribute)


def _load_entry_point(name: str) -> Any:
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        points.setdefault(point.name, []).append(point)
    if name not in points:
        listed = ", ".join(sorted(points)) or "none"
        raise RewardError(
            f"no reward '{name}'{_nearest(name, points)}; installed: {listed}. A reward of your own is named "
            "path/to/file.py:function or package.module:function"
        )
    if len({point.value for point in points[name]}) > 1:
        owners = ", ".join(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points[name])
        raise RewardError(f"reward '{name}' is installed by several packages: {owners}; name one as module:class")
    try:
        return points[name][0].load()
    except Exception as error:  # whatever the plug-in's import raises
        value = points[name][0].value
        raise RewardError(f"reward '{name}' ({value}) cannot be loaded: {type(error).__name__}: {error}") from error


def _load_module(name: str) -> Any:
    """An installed family of rewards, or else the module of that name."""
    is_family = any(point.name == name and not point.attr for point in entry_points(group=GROUP))
    return _load_entry_point(name) if is_family else importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    """The file as a module, executed once per process however often it is named."""
    path = path.expanduser().resolve()
    module_name = f"unirg_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # a name that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a module up by name while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _option_names(name: str, written: Any) -> list[str]:
    """The options a reward takes: a class's constructor parameters, or a function's parameters after the two lists.
    A function's named columns are among them, and are no harm there. `**columns` never stands for an option, so a
    misspelt one is an error."""
    if not callable(written):
        return []
    parameters = list(inspect.signature(written).parameters.values())
    skipped = 0 if inspect.isclass(written) else 2
    return [parameter.name for parameter in parameters[skipped:] if parameter.kind in _NAMED]


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""
