"""One vLLM server, as the trainer asks it: a request, and what came of it."""

import json
import socket
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from unirg.errors import UserError

PROBE = 10.0
"""Seconds for what takes no computing: a connection, an answer about itself."""


class Fault(Exception):
    """A server did not answer as it should; it, or another, may do so later."""


class Server:
    """One vLLM server, by its address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.url, self.host, self.port = url.rstrip("/"), parts.hostname, parts.port
        self.open: set[HTTPConnection] = set()

    def post(self, path: str, body: dict[str, Any], timeout: float | None) -> Any:
        """The JSON that the server answers. Raises Fault, or UserError where it refuses the request as such. Goes
        straight to the server: a proxy of the environment is for other networks than a cluster's own."""
        limit: float | None = min(PROBE, timeout or PROBE)  # to connect
        connection = HTTPConnection(self.host, self.port, timeout=limit)
        self.open.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            if connection not in self.open:
                raise Fault("broken off")
            limit = timeout
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except TimeoutError as error:
            raise Fault(f"no answer in {limit:g} s") from error
        except (OSError, HTTPException) as error:
            raise Fault(str(error) or type(error).__name__) from error
        finally:
            self.open.discard(connection)
            connection.close()
        said = " ".join(content.decode(errors="replace").split())[:300]
        if response.status >= 500:
            raise Fault(f"answered {response.status}: {said}")
        if response.status == 404:
            raise UserError(f"{self.url} has no {path}; start it by `unirg rollout-server`")
        if response.status != 200:
            raise UserError(f"{self.url} answered {response.status}: {said}")
        try:
            return json.loads(content) if content else None
        except json.JSONDecodeError as error:
            raise Fault(f"answered what is no JSON: {said}") from error

    def workers(self, method: str, *args: Any, timeout: float | None) -> list[dict[str, Any]]:
        """What each of the server's workers returns from a method of `vllm_worker.WeightReceiver`."""
        results = self.post("/collective_rpc", {"method": method, "args": list(args)}, timeout)["results"]
        if not results or not all(isinstance(result, dict) for result in results):
            raise Fault(f"its workers answered {results}")
        return list(results)

    def break_off(self) -> None:
        """Ends the requests that are open, and the waiting of their threads: vLLM drops those whose client has gone."""
        for connection in list(self.open):
            self.open.discard(connection)  # one that is not connected yet sees this when it is
            with suppress(OSError, AttributeError):  # it may be at its end, or not at its beginning
                connection.sock.shutdown(socket.SHUT_RDWR)
