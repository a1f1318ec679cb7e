"""A judge's endpoint that fails, costs, is asked twice, or is not where reports may go."""

import functools
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from tests.judge_server import CANDIDATE, REFERENCE, TOKENS, answer, judge_reward, scores_of, serve
from unirg.scoring.contract import RewardError
from unirg.scoring.registry import load_reward
from unirg_rewards import judge, judge_endpoint
from unirg_rewards.judge_cache import JudgeCache

GOOD = answer(location=3)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def reward(tmp_path):
    return functools.partial(judge_reward, tmp_path)


# failures


@pytest.mark.parametrize("failure", [429, 500, 503, "drop", "cut", b"no json", b'{"choices": []}', b"[1]"])
def test_a_passing_failure_is_asked_again(reward, failure):
    with serve(lambda body, number: failure if number < 3 else GOOD) as server:
        assert scores_of(reward(server)) == [1 / 4]
        assert len(server.bodies) == 4


@pytest.mark.parametrize("failure", [429, 500, "drop", "cut", b"no json"])
def test_a_lasting_failure_masks_and_never_scores(reward, failure):
    def for_one(body, number):
        return failure if f"{CANDIDATE} 0" in body["messages"][1]["content"] else GOOD

    with serve(for_one) as server, pytest.warns(RuntimeWarning, match="masked"):
        assert scores_of(reward(server, attempts=2), 3) == [None, 1 / 4, 1 / 4]


def test_a_hanging_endpoint_is_left_after_the_timeout(reward):
    with serve(lambda body, number: "hang" if number == 0 else GOOD) as server:
        assert scores_of(reward(server, request_timeout=0.3)) == [1 / 4]
        assert len(server.bodies) == 2


def test_an_endpoint_that_is_not_there_masks(reward):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with serve(GOOD) as server, pytest.warns(RuntimeWarning, match="ConnectionRefused"):
            assert scores_of(reward(server, base_url=url, attempts=2), 2) == [None, None]


def test_a_dead_endpoint_is_given_up_for_the_rest_of_the_call(reward):
    with serve(500) as server:
        loaded = reward(server, attempts=2, concurrency=2)
        with pytest.warns(RuntimeWarning):
            assert scores_of(loaded, 20) == [None] * 20
        assert len(server.bodies) <= 8  # two pairs failed in row, and those under way
        server.script = lambda body, number: GOOD
        assert scores_of(loaded, 20) == [1 / 4] * 20


def test_a_request_that_the_endpoint_refuses_is_not_repeated(reward):
    with serve(lambda body, number: 400 if number == 0 else GOOD) as server:
        loaded = reward(server)
        with pytest.warns(RuntimeWarning, match="400"):
            assert scores_of(loaded) == [None]
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_an_error_at_the_start_and_a_mask_later(reward, status):
    with serve(status) as server, pytest.raises(RewardError, match=f"{status}.*api_key_env"):
        scores_of(reward(server), 3)
    with serve(lambda body, number: GOOD if number == 0 else status) as server:
        loaded = reward(server)
        assert loaded.score([CANDIDATE], [REFERENCE]) == [1 / 4]
        with pytest.warns(RuntimeWarning, match=str(status)):
            assert scores_of(loaded) == [None]


def test_a_redirect_is_not_followed(reward):
    with serve(GOOD) as elsewhere, serve(307, headers={"Location": f"{elsewhere.base_url}/x"}) as server:
        for status in (301, 302, 303, 307, 308):
            server.script = lambda body, number, status=status: status
            with pytest.warns(RuntimeWarning, match=str(status)):
                assert scores_of(reward(server)) == [None]
        assert elsewhere.bodies == []


def test_waits_grow_by_chance_up_to_a_bound_and_obey_the_server(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 1.0)
    waits = [[judge._pause(attempt, None) for _ in range(200)] for attempt in range(8)]
    for attempt, drawn in enumerate(waits):
        longest = min(60.0, 2.0**attempt)
        assert longest / 2 <= min(drawn) and max(drawn) <= longest and len(set(drawn)) > 100
    assert judge._pause(0, 7.0) == 7.0
    assert judge._pause(0, 1e9) == 60.0


def test_a_wait_stands_between_two_attempts_only(reward, monkeypatch):
    waited = []
    monkeypatch.setattr(judge, "_pause", lambda attempt, asked: waited.append((attempt, asked)) or 0.0)
    with serve(429, headers={"Retry-After": "2"}) as server, pytest.warns(RuntimeWarning, match="429"):
        assert scores_of(reward(server, attempts=3)) == [None]
        assert len(server.bodies) == 3
    assert waited == [(0, 2.0), (1, 2.0)]


@pytest.mark.parametrize(("header", "expected"), [("3", 3.0), ("-1", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_retry_after_is_read(header, expected):
    with serve(429, headers={"Retry-After": header}) as server, pytest.raises(judge_endpoint.Failed) as failed:
        judge_endpoint.ask(f"{server.base_url}/chat/completions", {}, None, 5)
    assert failed.value.again and failed.value.wait == expected


def test_what_is_said_of_failures_holds_no_report(reward):
    with serve(400) as server, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = reward(server)
        assert scores_of(loaded, 5) == [None] * 5
        assert scores_of(loaded, 5) == [None] * 5
    assert len(said) == 1 and "effusion" not in str(said[0].message)


# limits


def _when_so_many_wait(count):
    """A script that answers only while `count` requests are under way, and then slowly."""
    together = threading.Barrier(count, timeout=30)

    def script(body, number):
        together.wait()
        time.sleep(0.01)
        return GOOD

    return script


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_requests_are_under_way_as_allowed_and_no_more(reward, concurrency):
    with serve(_when_so_many_wait(concurrency)) as server:
        assert scores_of(reward(server, concurrency=concurrency), 9) == [1 / 4] * 9
        assert server.most_at_once == concurrency


def test_two_calls_at_once_share_the_limit(reward):
    with serve(_when_so_many_wait(2)) as server:
        loaded = reward(server, concurrency=2)
        loaded.setup()
        calls = [
            threading.Thread(target=loaded.score, args=([f"{CANDIDATE} {k}{i}" for i in range(4)], [REFERENCE] * 4))
            for k in range(3)
        ]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        assert server.most_at_once == 2 and len(server.bodies) == 12


def test_at_the_limit_of_requests_samples_are_masked_and_that_is_said_once(reward):
    with serve(GOOD) as server:
        loaded = reward(server, max_requests=3, run="r", concurrency=1)
        with pytest.warns(RuntimeWarning, match=r"run 'r'.*3 requests") as said:
            assert scores_of(loaded, 5) == [1 / 4] * 3 + [None] * 2
            assert scores_of(loaded, 6) == [1 / 4] * 3 + [None] * 3  # the cache still answers
        assert len(said) == 1 and len(server.bodies) == 3
        again = reward(server, max_requests=3, run="r")  # a restarted worker or a run that goes on
        with pytest.warns(RuntimeWarning):
            assert again.score(["Another."], [REFERENCE]) == [None]
        assert reward(server, max_requests=3, run="another").score(["Another."], [REFERENCE]) == [1 / 4]


def test_at_the_limit_scoring_may_raise(reward):
    with serve(GOOD) as server:
        loaded = reward(server, max_requests=2, run="r", at_limit="raise")
        with pytest.raises(RewardError, match="max_requests"):
            scores_of(loaded, 5)
        assert len(server.bodies) == 2


def test_retries_count(reward):
    with serve(500) as server, pytest.warns(RuntimeWarning):
        assert scores_of(reward(server, max_requests=3, run="r", attempts=10)) == [None]
        assert len(server.bodies) == 3


def test_the_limit_of_tokens_uses_the_servers_count_or_an_estimate(reward, tmp_path):
    with serve(GOOD) as server, pytest.warns(RuntimeWarning, match="300 tokens"):
        scores = scores_of(reward(server, max_tokens=2 * TOKENS + 1, run="r", concurrency=1), 5)
        assert scores == [1 / 4] * 3 + [None] * 2
    with serve(GOOD, usage=False) as server:
        scores_of(reward(server, run="estimated", cache=str(tmp_path / "e.sqlite")))
    _, tokens = JudgeCache(str(tmp_path / "e.sqlite")).spent("estimated")
    assert 300 < tokens < 3000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_requests": 5}, "run"),
        ({"count": "some"}, "count"),
        ({"at_limit": "stop"}, "at_limit"),
        ({"concurrency": 0}, "concurrency"),
        ({"attempts": 0}, "attempts"),
        ({"bas_url": "x"}, "base_url"),
    ],
)
def test_wrong_options_are_named(reward, options, said):
    with serve(GOOD) as server, pytest.raises(RewardError, match=said):
        reward(server, **options)


# the cache


def test_a_cached_pair_makes_no_request_even_without_a_server(reward):
    with serve(GOOD) as server:
        assert scores_of(reward(server), 4) == [1 / 4] * 4
        assert len(server.bodies) == 4
    assert scores_of(reward(server), 4) == [1 / 4] * 4  # the server is gone


def test_another_model_wording_setting_or_reference_is_another_entry(reward, monkeypatch):
    with serve(GOOD) as server:
        scores_of(reward(server))
        scores_of(reward(server, model="k"))
        scores_of(reward(server, request={"top_p": 0.5}))
        reward(server).score([f"{CANDIDATE} 0"], [REFERENCE + " "])
        monkeypatch.setattr("unirg_rewards.judge_errors.QUESTION", "Another question.")
        scores_of(reward(server))
        assert len(server.bodies) == 5


def test_the_cache_holds_no_text_and_is_its_owners_alone(reward, tmp_path):
    with serve(GOOD) as server:
        scores_of(reward(server))
    raw = (tmp_path / "c.sqlite").read_bytes()
    assert b"effusion" not in raw and b"[0, 0, 3" in raw
    assert (tmp_path / "c.sqlite").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_cache_is_named(reward, tmp_path):
    (tmp_path / "c.sqlite").write_text("notes " * 500)
    with serve(GOOD) as server, pytest.raises(RewardError, match=r"c\.sqlite"):
        reward(server).setup()


PROCESS = """
import sys
sys.path.insert(0, {root!r})
from unirg_rewards.judge_errors import JudgeErrors
from unirg_rewards.judge_cache import JudgeCache
mode, url, cache = sys.argv[1:]
if mode == "score":
    judge = JudgeErrors(base_url=url, model="j", cache=cache, max_requests=25, run="r")
    import warnings; warnings.simplefilter("ignore")
    scores = judge.score([f"Candidate {{i}}." for i in range(40)], ["Reference."] * 40)
    print(sum(score is not None for score in scores))
else:
    cache = JudgeCache(cache)
    for i in range(10**9):
        cache.store(str(i), [i] * 12)
        cache.reserve("k", None, None)
        if i == 20:
            print("writing", flush=True)
"""


def _process(tmp_path, mode, url):
    code = PROCESS.format(root=str(Path(judge.__file__).parents[1]))
    arguments = [sys.executable, "-c", code, mode, url, str(tmp_path / "shared.sqlite")]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_processes_share_answers_and_limit(tmp_path):
    with serve(GOOD) as server:
        processes = [_process(tmp_path, "score", server.base_url) for _ in range(2)]
        for process in processes:
            assert int(process.communicate(timeout=60)[0]) > 0
        assert len(server.bodies) == 25
        cache = JudgeCache(str(tmp_path / "shared.sqlite"))
        assert cache.spent("r") == (25, 25 * TOKENS)
        known = cache._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        assert int(_process(tmp_path, "score", server.base_url).communicate(timeout=60)[0]) == known > 0
        assert len(server.bodies) == 25  # what the third knows, the first two asked


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_cache(tmp_path):
    writer = _process(tmp_path, "write", "-")
    assert writer.stdout.readline() == "writing\n"
    writer.kill()
    writer.wait(30)
    writer.stdout.close()
    cache = JudgeCache(str(tmp_path / "shared.sqlite"))
    assert cache._database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    stored = cache._database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    assert stored >= 20 and 0 <= stored - cache.spent("k")[0] <= 1
    assert cache.answer("7") == [7] * 12


# where reports go


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.com/v1",
        "http://10.0.0.7:8000/v1",
        "http://127.0.0.1.example.com/v1",
        "http://localhost.example.com/v1",
        "http://[2001:db8::1]:8000/v1",
        "http://0.0.0.0:8000/v1",
    ],
)
def test_another_machine_needs_leave(url, tmp_path):
    options = {"base_url": url, "model": "j", "cache": str(tmp_path / "c.sqlite")}
    with pytest.raises(RewardError, match="allow_remote"):
        load_reward("judge_errors", options)
    load_reward("judge_errors", options | {"allow_remote": True})


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://localhost:1/v1/", "http://[::1]:8000/v1"])
def test_this_machine_needs_none(url):
    load_reward("judge_errors", {"base_url": url, "model": "j"})


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://key@localhost/v1", "http://localhost/v1?k=v"]
)
def test_what_is_no_plain_endpoint_is_refused(url):
    with pytest.raises(RewardError, match="base_url"):
        load_reward("judge_errors", {"base_url": url, "model": "j", "allow_remote": True})


def test_a_proxy_of_the_environment_sees_no_loopback_request(reward, monkeypatch):
    judge_endpoint._opener.cache_clear()
    with serve(GOOD) as server, serve(GOOD) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.base_url)
        assert scores_of(reward(server)) == [1 / 4]
        assert len(server.bodies) == 1 and proxy.bodies == []
    judge_endpoint._opener.cache_clear()
