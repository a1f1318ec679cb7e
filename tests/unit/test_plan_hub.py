"""A plan for a model of the hub: read from there where it answers, from its cache where it does not, and told at once
where neither has it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unirg import cli

PUBLISHED = json.loads((Path(__file__).parents[2] / "docs" / "configs" / "qwen3-vl-8b.json").read_text())
PUBLISHED["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 152000}
PUBLISHED["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2}
PUBLISHED["vision_config"] |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
CONFIG = json.dumps(PUBLISHED).encode()
COMMIT = "0123456789012345678901234567890123456789"
RECIPE = """
name: hub
data: {adapter: jsonl, files: {train: train.jsonl}}
policy: {model: some/model, lora: {rank: 4}, dtype: bfloat16}
stages: [{name: sft, kind: sft, steps: 1, studies_per_step: 1, optimiser: {learning_rate: 1.0e-3}}]
"""


class Hub(BaseHTTPRequestHandler):
    """A hub whose models have a config.json and nothing else; or one that breaks off, as a network that is down."""

    asked: list[str] = []
    away = False

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        if self.away:
            self.close_connection = True
            return
        found = self.path.endswith("/config.json")
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if found:
            self.send_header("ETag", '"config"')
            self.send_header("Content-Length", str(len(CONFIG)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.endswith("/config.json"):
            self.wfile.write(CONFIG)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, and an empty cache."""
    handler = type("OneHub", (Hub,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield handler
        server.shutdown()


def plan(folder: Path) -> int:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return cli.main(["plan", str(path), "--gpus", "1"])


def test_a_model_comes_from_the_hub_then_from_its_cache(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path) == 0
    first = capsys.readouterr().out
    assert "hub: some/model, " in first and "embeddings 9.73M" in first  # 152,000 of 64
    assert any("tokenizer" in path for path in hub.asked)  # lengths would be better with one
    hub.away = True
    hub.asked.clear()
    assert plan(tmp_path) == 0
    assert capsys.readouterr().out == first
    assert len(hub.asked) == 1  # and not six times for each file that the cache lacks


def test_no_hub_and_no_cache_is_told_at_once(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.away = True
    assert plan(tmp_path) == 2
    said = capsys.readouterr().err
    assert "policy.model: 'some/model' is no folder here and not in the hub's cache, and the hub does not" in said
    assert "config.json with --config" in said and "hf download some/model config.json" in said
    assert len(hub.asked) == 1
