"""The two control routes, without a web framework: ``routes`` and ``local`` only carry them.

    GET  /drafttrain/status                      EngineStatus
    POST /drafttrain/drafter  {"version": N}     SwapResult

A request is a conversation with the workers (:func:`handle`): worker calls, and what comes of their
replies. Anything wrong becomes ``{"error": ...}`` with a status:

    400  not JSON, or without a version          409  refused as things are (no registry, not on)
    401  bearer token missing or wrong           422  no such version, or it does not fit
    404  no such route, or drafttrain is not switched on in this engine
"""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.errors import ConfigError

STATUS = "/drafttrain/status"
DRAFTER = "/drafttrain/drafter"
TOKEN_VARIABLE = "DRAFTTRAIN_TOKEN"

MAX_BODY_BYTES = 4096
# Versions are numbered from one; what does not fit the registry's folder names cannot exist.
_MAX_VERSION = 999_999_999


# Between two questions whether a version is read; each one waits for an engine step to end.
_ASK_AGAIN_SECONDS = 0.05


@dataclass(frozen=True)
class Call:
    """A worker method to be run by ``collective_rpc``, after a pause."""

    method: str
    args: tuple[Any, ...] = ()
    pause: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What goes back to the client, as JSON."""

    status: int
    body: dict[str, Any]


Replies = list[dict[str, Any]]

# Yields worker calls, is sent their replies (one per worker), and returns the answer.
Conversation = Generator[Call, Replies, Answer]


def read_token(token_file: Path | None) -> str | None:
    """The bearer token: from the file, else from ``DRAFTTRAIN_TOKEN``, else None (no guard).

    Raises:
        ConfigError: the file is unreadable or empty, or what it holds cannot stand in a header.
    """
    if token_file is None:
        found = os.environ.get(TOKEN_VARIABLE)
        return _checked_token(found, "environment", TOKEN_VARIABLE) if found else None
    try:
        return _checked_token(token_file.read_bytes().decode("latin-1"), token_file, "token")
    except OSError as error:
        raise ConfigError(token_file, "token", f"cannot be read: {error.strerror}") from error


def _checked_token(found: str, where: str | Path, field: str) -> str:
    """No message ever quotes it."""
    token = found.strip()
    if not token:
        raise ConfigError(where, field, "is empty; expected a token")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(where, field, "expected printable ASCII characters without spaces")
    return token


def handle(
    method: str, path: str, body: bytes, authorization: str | None, token: str | None
) -> Conversation:
    """A request, as the worker calls it takes and the answer they lead to.

    Args:
        method: HTTP's.
        path: without the query.
        body: of the request.
        authorization: value of that header.
        token: that POST must bring; None: none.
    """
    if (method, path) == ("GET", STATUS):
        return (yield from status())
    if (method, path) != ("POST", DRAFTER):
        return _refused(404, "no such route")
    if token is not None and not _bears(authorization, token):
        return _refused(401, "the bearer token is missing or wrong")
    version = _version(body)
    if version is None:
        return _refused(400, 'expected {"version": N} with a positive integer')
    return (yield from swap(version))


def status() -> Conversation:
    return _joined((yield Call("drafttrain_status")))


def swap(version: int) -> Conversation:
    """The workers read the version while they generate; only loading it comes between steps."""
    replies = yield Call("drafttrain_prepare", (version,))
    while _joined(replies).status == 200 and not all(reply["ready"] for reply in replies):
        replies = yield Call("drafttrain_prepare", (version,), pause=_ASK_AGAIN_SECONDS)
    if (refused := _joined(replies)).status != 200:
        return refused
    return _joined((yield Call("drafttrain_swap", (version,))))


def run(conversation: Conversation, rpc: Callable[[Call], Replies]) -> Answer:
    """Holds a conversation with the workers."""
    try:
        call = next(conversation)
        while True:
            time.sleep(call.pause)
            call = conversation.send(rpc(call))
    except StopIteration as end:
        answer: Answer = end.value
        return answer


def _joined(replies: Replies) -> Answer:
    """The workers' replies as one: theirs agree, or one says what went wrong."""
    for reply in replies:
        if "error" in reply:
            return _refused(reply["status"], reply["error"])
    return Answer(200, replies[0])


def _bears(authorization: str | None, token: str) -> bool:
    scheme, _, given = (authorization or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    return right and scheme.lower() == "bearer"


def _version(body: bytes) -> int | None:
    try:
        document = json.loads(body) if len(body) <= MAX_BODY_BYTES else None
    except (ValueError, RecursionError):
        return None
    version = document.get("version") if isinstance(document, dict) else None
    return version if type(version) is int and 0 < version <= _MAX_VERSION else None


def _refused(status: int, error: str) -> Answer:
    return Answer(status, {"error": error})
