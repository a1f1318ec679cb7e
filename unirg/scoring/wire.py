"""What a scoring server and its clients agree on: JSON over HTTP, a bearer token, and how long silence may last.

    POST /setup   {name, options}                                  -> {identity, deduplicate, evaluation_only, ...}
    POST /score   {name, options, identity, kind, timeout,
                   candidates, references, columns}                -> {scores, or null, and reason}
    GET  /health                                                   -> {ready, requests, reports, failed, refused}

A request that cannot be served is answered with a status of 400 to 499 and {error}. While a call waits for its turn or
is scored, its answer, which has begun, is a blank every `BEAT_SECONDS`: so a client tells a server that is busy from
one that is gone. An answer that ends before its JSON does was cut off by a server that ended.
"""

import ipaddress
import json
import os
from pathlib import Path
from typing import Any

from unirg.scoring.contract import RewardError

LARGEST = 64 << 20
"""Bytes of a request or an answer."""
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""After so long without a byte the other side counts as gone."""
TOKEN = "UNIRG_REWARDS_TOKEN"
"""The environment variable with the token, for servers and clients."""
SHORTEST_TOKEN = 16


def pack(message: Any) -> bytes:
    """JSON in UTF-8. Lone surrogates, which a reward may meet, pass as they are: escaped, two of them would come out as
    one character."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def unpack(data: bytes) -> Any:
    """What `pack` packed. Raises ValueError (or RecursionError, where it is nested without end)."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def canonical(value: Any) -> str:
    """One text for what is the same JSON, in whatever order its keys stand; 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def unlike_json(value: Any) -> str | None:
    """What in `value` would come out of JSON as something else, in words: a tuple, a key that is a number, a date. None
    where all of it comes out as it went in."""
    if value is None or isinstance(value, (str, int, float)):
        return None
    if isinstance(value, list):
        return next((found for item in value if (found := unlike_json(item))), None)
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str)), None)
        return f"a key that is a {type(odd).__name__}" if odd is not None else unlike_json(list(value.values()))
    return f"a {type(value).__name__}"


def is_loopback(address: str) -> bool:
    """Whether a host, by name or number, is this machine and can be reached from it alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def read_token(file: Path | None = None) -> str | None:
    """The token in `file`, or else in the environment; None where there is none.

    Raises RewardError, which quotes nothing of it: a file that cannot be read, a token too short or of odd characters.
    """
    where, text = f"the environment variable {TOKEN}", os.environ.get(TOKEN, "")
    if file is not None:
        try:
            where, text = str(file), file.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise RewardError(f"{file}: the token cannot be read ({error.strerror})") from error
    text = text.strip()
    if not text and file is None:
        return None
    if len(text) < SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in text):
        raise RewardError(
            f"{where}: expected a token of at least {SHORTEST_TOKEN} letters, digits and signs, without blanks; "
            "`openssl rand -hex 32` makes one"
        )
    return text
