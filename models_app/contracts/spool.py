"""Usage spool: what a gateway appends for every request and the bulk worker ingests. Pure: no Django, no I/O.

Files of one folder (0600), JSON lines, named by the gateway's id and a sequence number that only grows:

* `<gateway>.<sequence>.open` is being written. Its writer holds an exclusive flock from before it has this name until it is
  closed, so one that can be locked belongs to a dead gateway and is complete as it is.
* `<gateway>.<sequence>.jsonl` is closed and will never change.

A file is closed at MAX_FILE_BYTES, or MAX_FILE_AGE_S after its first new line. The start records of requests that still run
are written again at the top of the next file, before the old one is closed, so a record may appear more than once; `id`
tells. A torn last line was never acknowledged and is to be skipped.
"""

from __future__ import annotations

import re
from typing import Literal, TypedDict

MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_FILE_AGE_S = 2.0
OPEN_SUFFIX = ".open"
CLOSED_SUFFIX = ".jsonl"
FILE_NAME = re.compile(r"(?P<gateway>[A-Za-z0-9_-]{1,80})\.(?P<sequence>\d{8,})\.(?P<state>open|jsonl)")

# Ends a gateway writes; a start whose gateway died without an end becomes gateway_lost (models_app/models/usage.py).
End = Literal["stop", "length", "tool_calls", "client_gone", "error"]


class StartRecord(TypedDict):
    """A request was admitted."""

    t: Literal["start"]
    id: str  # unique for ever, made by the gateway
    at: float  # Unix seconds of receipt
    user: int
    key: int  # primary key of the APIKey row
    user_name: str
    key_public_id: str
    model: str  # the model's own name, also where the client used an alias
    endpoint: str  # path under the gateway's root, /v1/chat/completions
    stream: bool
    gateway: str


class EndRecord(TypedDict):
    """The same request ended; everything of its start again, so that either record alone is enough."""

    t: Literal["end"]
    id: str
    at: float
    user: int
    key: int
    user_name: str
    key_public_id: str
    model: str
    endpoint: str
    stream: bool
    gateway: str
    backend: str  # instance:<id>:<generation> or remote:<name>; empty if none was reached
    status: int  # HTTP status the client got; 0 if it never got one
    end: End
    error_code: str  # empty without an error
    prompt: int | None  # tokens; null where the backend did not report them
    cached: int | None
    completion: int | None
    queue_ms: float
    first_ms: float | None  # receipt to the first content byte; null if none came
    total_ms: float


def file_name(gateway: str, sequence: int, suffix: str) -> str:
    """Name of a spool file; names of one gateway sort by age."""
    return f"{gateway}.{sequence:08d}{suffix}"
