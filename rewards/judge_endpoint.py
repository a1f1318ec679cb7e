"""One question to an OpenAI-compatible chat endpoint, by the standard library alone.

A judge takes seconds to answer and is asked from a few threads at a time, so neither connection pools nor an event loop
would make it faster: `urllib` is enough, and a reward needs no client library.

Nothing but the named endpoint is ever contacted: redirects are refused, and a proxy of the environment is used for
https alone, where it cannot read what passes.
"""

import functools
import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LONGEST_ANSWER = 4_000_000  # bytes; more is no answer
BYTES_PER_TOKEN = 3  # where a server does not count tokens; a cautious guess, so that a limit still holds

_AGAIN = {408, 409, 425, 429}  # and every 5xx
_SETTING = {401, 403, 404}  # wrong key, wrong model or wrong path


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and the tokens of question and answer together."""

    text: str
    tokens: int


class Failed(Exception):
    """A request without an answer. The message says why, without a word of what was sent."""

    def __init__(self, reason: str, *, again: bool, wait: float | None = None, setting: bool = False) -> None:
        super().__init__(reason)
        self.again = again
        """Whether asking again may help."""
        self.wait = wait
        """Seconds the server asks to wait, where it says so."""
        self.setting = setting
        """Whether key, model or URL are wrong, so that no request can succeed."""


def checked_url(base_url: str, allow_remote: bool) -> str:
    """The URL of the endpoint's chat completions.

    Raises ValueError: no http(s) URL, credentials inside it, or another machine without `allow_remote`.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url '{base_url}' is no endpoint; expected e.g. http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url holds more than scheme, host and path; a key comes from `api_key_env` alone")
    if not (allow_remote or _is_loopback(parts.hostname)):
        raise ValueError(
            f"base_url names another machine ({parts.hostname}), and every reference and candidate report would be "
            "sent there; set `allow_remote: true` where your data's terms permit that"
        )
    return base_url.rstrip("/") + "/chat/completions"


def ask(url: str, body: dict[str, Any], key: str | None, timeout: float) -> Answer:
    """Post `body` to `url` with bearer `key`, and wait at most about `timeout` seconds for the whole answer.

    Raises Failed.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode()
    parts = urlsplit(url)
    secure_proxy = parts.scheme == "https" and not _is_loopback(parts.hostname or "")
    try:
        request = urllib.request.Request(url, data, headers, method="POST")
        with _opener(secure_proxy).open(request, timeout=timeout) as response:
            raw = _whole(response, time.monotonic() + timeout)
    except urllib.error.HTTPError as error:
        raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Failed(f"no answer ({type(reason).__name__}: {reason})", again=True) from None
    try:
        message = json.loads(raw)
        text = message["choices"][0]["message"]["content"]
        used = (message.get("usage") or {}).get("total_tokens")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Failed("an answer that is no chat completion", again=True) from None
    text = text if isinstance(text, str) else ""
    if not isinstance(used, int) or used <= 0:
        used = (len(data) + len(text.encode(errors="replace"))) // BYTES_PER_TOKEN
    return Answer(text, used)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry key and reports elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


@functools.cache
def _opener(proxy: bool) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler(None if proxy else {}), _NoRedirect)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _whole(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, read piece by piece: a socket's own timeout never ends a server that sends a byte now and then."""
    pieces, size = [], 0
    while piece := response.read1(65536):
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST_ANSWER:
            raise Failed(f"an answer of more than {LONGEST_ANSWER} bytes", again=False)
        if time.monotonic() > deadline:
            raise Failed("no whole answer in time", again=True)
    return b"".join(pieces)


def _refusal(error: urllib.error.HTTPError) -> Failed:
    """The server's own words are left out: some repeat the prompt, and a log is no place for a report."""
    with error:
        try:
            wait = max(0.0, float(error.headers.get("Retry-After", "")))
        except ValueError:
            wait = None
    again = error.code in _AGAIN or error.code >= 500
    phrase = http.client.responses.get(error.code, "")
    return Failed(f"HTTP {error.code} {phrase}".strip(), again=again, wait=wait, setting=error.code in _SETTING)
