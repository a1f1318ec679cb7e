"""Served rewards: the same scores as here, whoever else asks, and nothing else than what was asked for."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.served import Served, serve
from unirg.cli import main
from unirg.scoring.contract import RewardConfig, RewardError, ScoreBatch
from unirg.scoring.engine import ScoringEngine
from unirg.scoring.registry import check_trainable
from unirg.scoring.wire import LARGEST, TOKEN, pack, unlike_json, unpack

FILE = '''
import os

def length(candidates, references, **columns):
    return [float(len(text)) if truth else None for text, truth in zip(candidates, references)]

def letters(candidates, references, **columns):
    """Another number for any other text."""
    return [float(sum((place + 1) * ord(letter) for place, letter in enumerate(text))) for text in candidates]

def rank(candidates, references, **columns):
    return [float(index) for index in range(len(candidates))]

rank.deduplicate = False

def order(candidates, references, labels, score, **columns):
    """What is lost where the columns are not as they were."""
    return [float(list(known) == ["b", "a"] and number + known["b"]) for known, number in zip(labels, score)]

def token(candidates, references, **columns):
    return [float("UNIRG_REWARDS_TOKEN" in os.environ)] * len(candidates)

class Vain:
    evaluation_only = "it counts adjectives"
    identity = {"version": 3}

    def __init__(self, *, worth=1.0, style="plain"):
        self.worth = worth

    def score(self, candidates, references, **columns):
        return [self.worth] * len(candidates)

    def corpus_terms(self, candidates, references, **columns):
        return {"share": [(1.0, 2.0) for _ in candidates]}
'''
OWN = ("length", "letters", "rank", "order", "Vain(worth=0.5)")
BUILT_IN = ("bleu", "rouge_l", "entity_f1(polarity=positive)", "label_f1")
STUDIES = 12
BATCH = ScoreBatch(
    [f"There is a small left effusion{' and a nodule' * (row % 3)}." for row in range(STUDIES)] * 2,
    ["" if row == 5 else "Small left pleural effusion. No pneumothorax." for row in range(STUDIES)] * 2,
    {
        "study_id": [f"s{row}" for row in range(STUDIES)] * 2,
        "labels": [{"b": 1, "a": 0, "effusion": 1} if row % 2 else {} for row in range(STUDIES)] * 2,
        "score": [1 / 3, 1e-300, float("inf"), 2**60, True, -0.0] * 4,
        "truncated": [False] * (2 * STUDIES),
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    (path / "own.py").write_text(FILE)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with serve([*BUILT_IN, *(f"{folder}/own.py:{name}" for name in OWN)], folder) as running:
        yield running


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def configs(folder: Path, server: Served | None) -> list[RewardConfig]:
    url = server.url if server else None
    built_in = [
        *(RewardConfig(name=name, server=url) for name in ("bleu", "rouge_l", "label_f1")),
        RewardConfig(name="entity_f1", options={"polarity": "positive"}, server=url, batch_size=5),
    ]
    return [*built_in, *(own(folder, name, server) for name in ("length", "letters", "rank", "order"))]


def own(folder: Path, name: str, server: Served | None, **more: Any) -> RewardConfig:
    return RewardConfig(name=f"{folder}/own.py:{name}", server=server.url if server else None, **more)


def score(engine: ScoringEngine, batch: ScoreBatch = BATCH) -> dict[str, list[float | None]]:
    return engine.collect(engine.submit(batch))


@pytest.mark.parametrize("supervised", [True, False])
def test_the_same_scores_as_here(folder: Path, server: Served, supervised: bool) -> None:
    with (
        ScoringEngine(configs(folder, server), supervised=supervised) as ours,
        ScoringEngine(configs(folder, None)) as here,
    ):
        expected = score(here)
        assert score(ours) == expected
        assert list(expected["length"][4:7]) == [expected["length"][4], None, expected["length"][6]]
        assert ours.compares and here.compares
        said = ours.identities()
        assert said == {label: identity | {"server": server.url} for label, identity in here.identities().items()}
        figures = ours.step_figures()
        assert figures["rewards/bleu/failed"] == 0 and 0 <= figures["time/scoring_hidden"] <= 1


def test_figures_of_a_corpus_and_what_is_no_training_reward(folder: Path, server: Served) -> None:
    vain = own(folder, "Vain", server, options={"worth": 0.5}, label="mine")
    with ScoringEngine([vain], supervised=True) as ours:
        assert ours.corpus_terms(ScoreBatch(["a", "b"], ["", ""])) == {"mine": {"share": [[(1.0, 2.0)]] * 2}}
        assert ours.identities()["mine"]["version"] == 3
    with pytest.raises(RewardError, match="'mine' is for evaluation only: it counts adjectives"):
        check_trainable([vain])


def test_two_trainers_at_once_get_their_own_scores(folder: Path, server: Served) -> None:
    wrong: list[Any] = []

    def train(mark: str) -> None:
        labels = ("length", "letters")
        with ScoringEngine([own(folder, name, server) for name in labels], supervised=True) as ours:
            for step in range(20):
                texts = [mark * (1 + step + row) for row in range(4)]
                handles = [ours.submit(ScoreBatch([text], ["r"])) for text in texts]
                for handle, text in zip(handles, texts, strict=True):
                    letters = sum((place + 1) * ord(mark) for place in range(len(text)))
                    if (found := ours.collect(handle)) != {"length": [len(text)], "letters": [letters]}:
                        wrong.append((text, found))
            wrong.extend(name for name in labels if ours.step_figures()[f"rewards/{name}/failed"])

    trainers = [threading.Thread(target=train, args=(mark,)) for mark in "aßx"]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join()
    assert wrong == []


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=())), max_size=8))
def test_any_text_arrives_as_it_is(folder: Path, server: Served, texts: list[str]) -> None:
    assert unpack(pack(texts)) == texts
    texts = [*texts, "\ud83d\ude00", "\U0001f600", "\x00\u2028"]  # a pair of surrogates, and the letter it would make
    expected = [float(sum((place + 1) * ord(letter) for place, letter in enumerate(text))) for text in texts]
    with ScoringEngine([own(folder, "letters", server)]) as ours:
        assert score(ours, ScoreBatch(texts, texts)) == {"letters": expected}


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=8,
    )
)
def test_what_json_would_change_is_not_sent(value: Any) -> None:
    if unlike_json(value) is None:
        assert repr(unpack(pack(value))) == repr(value)
    else:
        with pytest.raises((TypeError, AssertionError)):
            assert repr(unpack(pack(value))) == repr(value)


def test_a_column_that_cannot_be_sent_is_named(
    folder: Path, server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ScoreBatch(["a"], ["b"], {"study_id": ["1"], "view": [("left", 1)]})
    with ScoringEngine([own(folder, "length", server)], supervised=True) as ours:
        assert score(ours, batch) == {"length": [None]}
        assert ours.step_figures()["rewards/length/failed"] == 1
        assert score(ours)["length"][0] == 31.0
    assert "failed on studies 1: column 'view' holds a tuple, which JSON does not keep" in capsys.readouterr().err


def test_what_the_server_has_not_is_refused_and_what_differs_is_named(folder: Path, server: Served) -> None:
    refused = {
        r"no reward 'meteor'; it serves bleu, rouge_l, .*own.py:length": RewardConfig(name="meteor", server=server.url),
        r"'bleu' with other options: variant is not given here, \"coco4\" there": RewardConfig(
            name="bleu", options={"variant": "coco4"}, server=server.url
        ),
        r"Vain' with other options: worth is 0.5 here, 0.25 there, style is not given here, \"bold\" there": own(
            folder, "Vain", server, options={"worth": 0.25, "style": "bold"}
        ),
        r"polarity is \"positive\" here, not given there": RewardConfig(name="entity_f1", server=server.url),
    }
    for words, config in refused.items():
        with pytest.raises(RewardError, match=words):
            ScoringEngine([config], supervised=True)
    with pytest.raises(RewardError, match="'rank' compares a batch's candidates: it cannot have a batch_size"):
        ScoringEngine([own(folder, "rank", server, batch_size=2)])


def post(server: Served, path: str, body: bytes, length: str | None = None) -> tuple[int, dict[str, Any]]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
    try:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(len(body)) if length is None else length)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


GOOD: dict[str, Any] = {
    "name": "bleu",
    "options": {},
    "identity": {"name": "bleu", "options": {}, "metric": "BLEU", "variant": "rexrank"},
    "kind": "score",
    "timeout": 60.0,
    "candidates": ["a b"],
    "references": ["a b"],
    "columns": {"study_id": ["1"]},
}
BAD: dict[str, tuple[int, str, Any]] = {
    "no json": (400, "expected JSON", b"{"),
    "no utf-8": (400, "expected JSON", b'"\xff"'),
    "no end of lists": (400, "expected JSON", b"[" * 100_000),
    "a list": (400, "expected an object, got a list", []),
    "nothing": (400, "expected a reward's `name` and `options`", {}),
    "pickle": (400, "expected JSON", b"\x80\x04N."),
    "another length": (400, "a batch of 1 candidates has 2 references", GOOD | {"references": ["a", "b"]}),
    "no texts": (400, "candidates: expected a list of texts", GOOD | {"candidates": [1]}),
    "no columns": (400, "columns: expected an object of lists", GOOD | {"columns": {"study_id": "1"}}),
    "another kind": (400, "kind is 'setup', expected score", GOOD | {"kind": "setup"}),
    "no time": (400, "timeout is nan, expected seconds", GOOD | {"timeout": float("nan")}),
    "not set up": (400, "expected the `identity`", {"name": "bleu", "options": {}}),
    "another reward by now": (409, "variant is .*rexrank.* here, .*x.* there", GOOD | {"identity": {"variant": "x"}}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_request_is_refused_in_words(server: Served, name: str) -> None:
    status, words, message = BAD[name]
    said = post(server, "/score", message if isinstance(message, bytes) else json.dumps(message).encode())
    assert said[0] == status and re.search(words, said[1]["error"]), said
    assert post(server, "/score", json.dumps(GOOD).encode()) == (200, {"scores": [1.0], "reason": ""})


def test_sizes_are_bounded_and_paths_few(server: Served) -> None:
    before = server.health()["refused"]
    assert post(server, "/score", b"", length=str(LARGEST + 1))[0] == 413
    assert post(server, "/score", b"", length="9" * 5000)[0] == 413
    assert post(server, "/score", b"", length="-1")[0] == 411
    assert post(server, "/rewards", b"{}")[0] == 404
    assert server.health()["refused"] == before + 4
    batch = ScoreBatch(["a" * (LARGEST // 4)] * 5, ["r"] * 5)
    with (
        ScoringEngine([RewardConfig(name="bleu", server=server.url)]) as ours,
        pytest.raises(RewardError, match="a request of 80 MiB; at most 64: set a `batch_size`"),
    ):
        score(ours, batch)


def test_a_token_is_asked_for_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "a-secret-of-some-length"
    (folder / "token").write_text(f"{secret}\n")
    name = f"{folder}/own.py:token"
    with Served("--rewards", name, "--token-file", str(folder / "token"), cwd=folder) as server:
        config = RewardConfig(name=name, server=server.url)
        for wrong in (None, "another-secret-of-some-length", secret[:-1]):
            monkeypatch.setenv(TOKEN, wrong) if wrong else monkeypatch.delenv(TOKEN, raising=False)
            with pytest.raises(RewardError, match=r"HTTP 401\): another token than this server's"):
                ScoringEngine([config])
        assert server.health()["requests"] == 0
        monkeypatch.setenv(TOKEN, secret)
        with ScoringEngine([config], supervised=True) as ours:
            assert score(ours, ScoreBatch(["a"], ["b"])) == {"token": [0.0]}
            assert secret not in json.dumps(ours.identities())
        server.process.terminate()
        assert secret not in server.said() and server.process.wait() == 0
    with ScoringEngine([RewardConfig(name=name)], supervised=True) as here:  # a trainer's workers have it neither
        assert score(here, ScoreBatch(["a"], ["b"])) == {"token": [0.0]}
    assert secret not in capsys.readouterr().err


def test_other_machines_are_served_with_a_token_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rewards", "serve", "--rewards", "bleu", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "can be reached from other machines, and there is no token" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN, "short")
    assert main(["rewards", "serve", "--rewards", "bleu", "--port", "0"]) == 2
    assert f"{TOKEN}: expected a token of at least 16 letters" in capsys.readouterr().err
    monkeypatch.delenv(TOKEN)
    with pytest.raises(RewardError, match=rf"http://192.0.2.1:8100 is another machine.*{TOKEN}"):
        ScoringEngine([RewardConfig(name="bleu", server="http://192.0.2.1:8100")])


RECIPE = """
name: x
data: {adapter: phantom}
policy: {tiny: {}}
stages:
  - {name: sft, kind: sft, steps: 1, optimiser: {learning_rate: 1.0e-3}}
  - name: a
    kind: grpo
    steps: 1
    optimiser: {learning_rate: 1.0e-3}
    rewards: [{name: bleu, server: "http://127.0.0.1:8100"}, {name: rouge_l}]
  - name: b
    kind: grpo
    steps: 1
    optimiser: {learning_rate: 1.0e-3}
    rewards: [{name: bleu, label: other, server: "http://127.0.0.1:8100", timeout: 5}, {name: length.py:no_such}]
evaluation:
  metrics: [{name: bleu, options: {variant: coco4}, server: "http://127.0.0.1:8100"}]
"""


def test_of_a_recipe_the_rewards_that_name_a_server_are_served(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    with Served(str(path), cwd=folder) as server:
        assert server.lines[-1].endswith(': bleu, bleu("variant": "coco4")\n')
        for options in ({}, {"variant": "coco4"}):
            with ScoringEngine([RewardConfig(name="bleu", options=options, server=server.url)]) as ours:
                assert score(ours, ScoreBatch(["a b c d e"], ["a b c d e"])) == {"bleu": [pytest.approx(1.0)]}
    refused = {
        "no stage 'sft' with rewards; there are: a, b": [str(path), "--stage", "sft"],
        "no reward here names a server": [str(path), "stages.a.rewards=[{name: bleu}]", "--stage", "a"],
        "give a recipe, or --rewards": [],
        "and --rewards has none": ["--rewards", "bleu", "--stage", "a"],
        "--port 65536: expected 0": ["--rewards", "bleu", "--port", "65536"],
        "with a `server`, `worker: false` has no meaning": [
            str(path),
            'stages.a.rewards=[{name: bleu, worker: false, server: "http://a:1"}]',
        ],
    }
    for server in (
        "node7:8100",
        "http://node7:x",
        "http://a:b@node7:1",
        "http://node7:8100/score",
        "ftp://node7:1",
        "http://node7",
        "http://a:65536",
    ):
        refused[f"server '{server}': expected http://HOST:PORT"] = [
            str(path),
            f'stages.a.rewards=[{{name: bleu, server: "{server}"}}]',
        ]
    for words, arguments in refused.items():
        assert main(["rewards", "serve", "--port", "0", *arguments]) == 2
        assert words in capsys.readouterr().err
