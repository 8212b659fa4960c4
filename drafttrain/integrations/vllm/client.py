"""Speaks to one engine's control routes. Needs neither vLLM nor torch."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import ValidationError

from drafttrain.errors import EngineError, EngineUnreachable
from drafttrain.integrations.vllm.control import DRAFTER, STATUS
from drafttrain.integrations.vllm.messages import SCHEMA_VERSION, EngineStatus, Message, SwapResult
from drafttrain.integrations.vllm.settings import SWITCH_ON

_Answer = TypeVar("_Answer", bound=Message)


class EngineClient:
    """One engine, at the URL of ``vllm serve`` or of ``serve_engine``.

    Args:
        url: of the server, without a path.
        token: bearer token that guards swaps.
        timeout: seconds until an engine counts as unreachable; a swap reads a checkpoint.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 120.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(headers=headers, timeout=timeout)

    def status(self) -> EngineStatus:
        """The engine's versions, acceptance and tap counters.

        Raises:
            EngineUnreachable: no answer.
            EngineError: it runs without the plugin, or another schema of it.
        """
        status = self._parsed(EngineStatus, self._request("GET", STATUS))
        if status.schema_version != SCHEMA_VERSION:
            problem = f"speaks schema {status.schema_version}, expected {SCHEMA_VERSION}"
            raise EngineError(f"{self.url}: drafttrain {status.plugin} {problem}")
        return status

    def drafter_version(self) -> int | None:
        """Registry version that serves; None when its drafter did not come from the registry.

        Raises:
            EngineError: as :meth:`status`.
        """
        return self.status().drafter_version

    def swap(self, version: int) -> SwapResult:
        """Makes the engine serve a version; returns when it does.

        Raises:
            EngineUnreachable: no answer.
            EngineError: refused, with the reason; the old drafter serves on.
        """
        return self._parsed(SwapResult, self._request("POST", DRAFTER, {"version": version}))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(
        self, method: str, path: str, body: dict[str, int] | None = None
    ) -> httpx.Response:
        try:
            response = self._http.request(method, self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineUnreachable(f"{self.url}: no answer: {error}") from error
        if response.status_code == 404:
            # vLLM itself swallows a plugin that fails to load: this is where it shows.
            raise EngineError(f"{self.url}: runs without drafttrain; {SWITCH_ON}")
        if response.is_error:
            raise EngineError(f"{self.url}: {_reason(response)}")
        return response

    def _parsed(self, kind: type[_Answer], response: httpx.Response) -> _Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "answer"
            raise EngineError(f"{self.url}: {field}: {first['msg']}") from error


def _reason(response: httpx.Response) -> str:
    try:
        document = response.json()
    except ValueError:
        document = None
    if isinstance(document, dict) and isinstance(document.get("error"), str):
        return f"refused: {document['error']}"
    return f"answered with status {response.status_code}"
