"""A server on loopback that speaks as a vLLM server with our worker does, and fails as a script says.

It takes weights over the real stream, answers with the first tokens of the greedy report of the policy whose weights it
has, and may hang, drop or refuse any request.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from unirg.policy import Policy, PolicyConfig, load_policy
from unirg.prompt import PromptConfig
from unirg.rollout import SamplingConfig
from unirg.rollout.sampler import VllmConfig
from unirg.rollout.vllm_server import ServerSampler
from unirg.rollout.weights import receive_weights
from unirg.study import Study
from unirg.tiny import TinyConfig

TINY = TinyConfig(vocabulary=310, hidden=32, heads=2, layers=1, mlp=32, vision_hidden=32, vision_layers=1)
GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"


@dataclass
class RolloutServer:
    """`script(path, number)` says what goes wrong with the request numbered from 0 for that path: None, a status,
    "hang" (until the server ends), "abort" (reports are cut short, as by a vLLM that is told to end), "drop" or
    "restart" (the connection closes, and the weights are forgotten)."""

    policy: Policy
    script: Callable[[str, int], str | int | None] = lambda path, number: None
    url: str = ""
    version: str | None = None
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    pushes: int = 0
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    describes: dict[str, Any] = field(default_factory=dict)
    """What it says of itself beside the truth."""
    reads: Callable[[list[int]], list[int]] = list
    """What it says to have read of a prompt's token ids."""
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == RPC and body["method"] == "unirg_describe":
            said = {"architecture": type(self.policy.base).__name__, "dtype": "float32", "max_model_len": 4100}
            said |= {"logprobs_mode": "processed_logprobs", "version": self.version}
            return {"results": [said | self.describes]}
        if path == RPC and body["method"] == "unirg_fetch":
            self.version = None
            self.loaded = {name: tensor.clone() for name, tensor in receive_weights(*body["args"])}
            self.pushes += 1
            return {
                "results": [{"missing": [n for n, _ in self.policy.base.named_parameters() if n not in self.loaded]}]
            }
        if path == RPC:
            (self.version,) = body["args"]
            return {"results": [{"version": self.version}]}
        if path == GENERATE:
            wanted = body["sampling_params"]
            ids = self._first_tokens(body["token_ids"], wanted)
            content = [{"token": str(token), "logprob": -1.0} for token in ids]
            choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "length"}
            choices = [choice | {"index": g} for g in reversed(range(wanted["n"]))]
            return {"choices": choices, "prompt_token_ids": self.reads(body["token_ids"])}
        return {"success": True}

    @torch.no_grad()
    def _first_tokens(self, prompt: list[int], wanted: dict[str, Any]) -> list[int]:
        with self.lock:
            model = copy.deepcopy(self.policy.base)
            model.load_state_dict(self.loaded, strict=False)
            ids = list(prompt)
            for _ in range(min(2, wanted["max_tokens"])):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            return ids[len(prompt) :]


@contextmanager
def serve(policy: Policy, **settings: Any) -> Iterator[RolloutServer]:
    """The server, until the block ends."""
    server = RolloutServer(policy, **settings)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.partition("?")[0]
            with server.lock:
                number = server.paths.count(path)
                server.paths.append(path)
                server.bodies.append(body)
            wrong = server.script(path, number)
            if wrong == "restart":
                server.version, server.loaded = None, {}
            if wrong == "hang":
                server.over.wait()
            if isinstance(wrong, str) and wrong != "abort":
                self.close_connection = True
                return
            answer: Any = {"error": "as the script says"} if isinstance(wrong, int) else server.answer(path, body)
            if wrong == "abort":
                for choice in answer["choices"]:
                    choice |= {"finish_reason": "abort", "token_ids": choice["token_ids"][:1]}
            content = json.dumps(answer).encode()
            self.send_response(wrong if isinstance(wrong, int) else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()


def text_policy() -> Policy:
    """One whose prompts have no images: vLLM itself is needed for those alone."""
    return load_policy(PolicyConfig(tiny=TINY), PromptConfig(style="short", images=False), texts=["a b"], seed=0)


def sampler_of(policy: Policy, *servers: RolloutServer, **settings: Any) -> ServerSampler:
    config = VllmConfig(mode="server", servers=[server.url for server in servers], **{"wait": 20.0} | settings)
    return ServerSampler(policy, config, SamplingConfig(max_new_tokens=4))


def sample(sampler: ServerSampler, studies: list[Study], group: int = 3, **options: Any) -> list[list[Any]]:
    prompts = [sampler.policy.encode(study) for study in studies]
    seeds = [[100 * i + g for g in range(group)] for i in range(len(studies))]
    return sampler.sample(prompts, seeds, **{"temperature": 0.7, "max_new_tokens": 4} | options)


def first_token(policy: Policy, study: Study) -> int:
    with torch.no_grad():
        return int(policy.model(input_ids=policy.encode(study).ids_P[None]).logits[0, -1].argmax())
