"""`unirg rewards serve`: a recipe's rewards, or some by name, as a service for the trainers of several nodes."""

import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unirg.scoring.command import parse_rewards
from unirg.scoring.contract import RewardConfig, RewardError
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.server import ScoringServer
from unirg.scoring.wire import canonical, read_token, unlike_json

EVERY_SECONDS = 60.0
"""What was served is told so often, where anything was."""


def serve(
    recipe: Path | None,
    overrides: Sequence[str] = (),
    *,
    rewards: str | None = None,
    stage: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8100,
    token_file: Path | None = None,
    logs: Path | None = None,
) -> int:
    """Serves until SIGINT or SIGTERM; then ends the workers and returns 0.

    Serves `rewards` (as `parse_rewards` reads them), or those of a recipe that name a server, of its GRPO stages and
    its evaluation or of one stage. `logs` is a folder for what the rewards print. Raises RewardError: nothing to serve,
    a reward that cannot be set up, an address that cannot be bound or wants a token.
    """
    if (recipe is None) == (rewards is None):
        raise RewardError("unirg rewards serve: give a recipe, or --rewards")
    if rewards is not None and (stage is not None or overrides):
        raise RewardError(
            "unirg rewards serve: --stage and KEY=VALUE say something of a recipe, and --rewards has none"
        )
    if not 0 <= port < 1 << 16:
        raise RewardError(f"--port {port}: expected 0 (any that is free) to 65535")
    if rewards is not None:
        configs = served(parse_rewards(rewards))
    else:
        assert recipe is not None
        configs = recipe_rewards(recipe, overrides, stage)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server: ScoringServer | None = None
    try:
        server = ScoringServer(host, port, read_token(token_file), say)
        with ScoringEngine(list(configs.values()), supervised=True, logs=logs) as engine:
            try:
                server.open(engine, configs)
                say(f"ready at {server.url}: {', '.join(configs)}")
                told = Counter(server.counts)
                while True:
                    time.sleep(EVERY_SECONDS)
                    told = tell(server, told)
            finally:
                server.end()  # before the workers: what was under way is to be asked again
    except KeyboardInterrupt:
        counts = server.counts if server is not None else Counter()
        say(f"ended after {counts['requests']} requests")
        return 0
    finally:
        if server is not None:
            server.server_close()
        signal.signal(signal.SIGTERM, before)


def recipe_rewards(recipe: Path, overrides: Sequence[str], stage: str | None) -> dict[str, RewardConfig]:
    """The rewards of a recipe that name a server, as `served` gives them. Raises RewardError where there are none, or
    no such stage."""
    from unirg.recipe.load import load_recipe
    from unirg.recipe.schema import GrpoStage

    resolved = load_recipe(recipe, overrides)
    stages = {s.name: s.rewards for s in resolved.stages if isinstance(s, GrpoStage)}
    if stage is not None and stage not in stages:
        raise RewardError(f"{recipe}: no stage '{stage}' with rewards; there are: {', '.join(stages) or 'none'}")
    chosen = [stages[stage]] if stage is not None else [*stages.values(), resolved.evaluation.metrics]
    configs = [config for part in chosen for config in part if config.server is not None]
    if not configs:
        raise RewardError(
            f"{recipe}: no reward here names a server; add `server: http://HOST:PORT` to those that one shall score"
        )
    return served(configs)


def served(configs: Sequence[RewardConfig]) -> dict[str, RewardConfig]:
    """The distinct rewards among these by label, to be scored here: name and options are all that a trainer's reward
    has in common with a server's. Raises RewardError where one is to run on two devices."""
    found: dict[str, RewardConfig] = {}
    for config in configs:
        if odd := unlike_json(config.options):
            raise RewardError(f"reward '{config.log_label}': its options hold {odd}; expected what JSON can hold")
        label = f"{config.name}({canonical(config.options)[1:-1]})" if config.options else config.name
        if label in found and found[label].device != config.device:
            raise RewardError(f"reward '{label}' is to run on {found[label].device} and on {config.device}: choose one")
        found[label] = RewardConfig(name=config.name, label=label, options=config.options, device=config.device)
    return found


def tell(server: ScoringServer, told: "Counter[str]") -> "Counter[str]":
    """Tells what was served since `told`, the counts then; returns those of now."""
    counts = Counter(server.counts)
    if counts != told:
        since = {name: counts[name] - told[name] for name in counts}
        say(", ".join(f"{number} {name}" for name, number in since.items()))
    return counts


def say(line: str) -> None:
    """A line on stdout, with the time. What requests hold may be in it, so nothing of it moves the cursor."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in line)
    print(f"{time.strftime('%H:%M:%S')} {shown}", flush=True)
