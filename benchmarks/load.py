"""Requests that stream from a server without a pause, and when each of their tokens came."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """One streaming request.

    Attributes:
        kind: what the benchmark made it for.
        prompt: index of its prompt.
        arrivals: ``time.perf_counter`` at every chunk of tokens.
        tokens: by completion, in order.
        finish_reasons: of the completions.
        failure: why it did not end well.
    """

    kind: str
    prompt: int
    arrivals: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)
    failure: str | None = None


# What to ask next: the kind, the index of the prompt, and the request's body.
NextRequest = Callable[[], tuple[str, int, dict[str, Any]]]


class Load:
    """Keeps a number of streaming requests in flight on a server until it is stopped.

    Args:
        url: of the server.
        sources: one request is kept in flight for each of them.
    """

    def __init__(self, url: str, sources: list[NextRequest]) -> None:
        self.streams: list[Stream] = []
        self._address = urlsplit(url).netloc
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(s,)) for s in sources]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, source: NextRequest) -> None:
        while not self._stop.is_set():
            kind, prompt, body = source()
            stream = Stream(kind, prompt)
            self.streams.append(stream)
            # A connection for each: one kept alive may be closed under the next request.
            with closing(http.client.HTTPConnection(self._address, timeout=60)) as connection:
                try:
                    _take(connection, body, stream)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    stream.failure = f"{type(error).__name__}: {error}"


def _take(connection: http.client.HTTPConnection, body: dict[str, Any], stream: Stream) -> None:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read(400)!r}")
    lines = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            stream.arrivals.append(time.perf_counter())
            lines.append(line)
    for line in lines:  # parsed only now: it must not delay the next chunk's time
        _parse(json.loads(line[len(b"data: ") :]), stream)


def _parse(chunk: dict[str, Any], stream: Stream) -> None:
    if "error" in chunk:
        raise ValueError(str(chunk["error"]))
    for choice in chunk["choices"]:
        stream.tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
        if choice["finish_reason"] is not None:
            stream.finish_reasons.append(choice["finish_reason"])
