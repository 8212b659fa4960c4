"""Entry point of ``vllm.endpoint_plugins``: the control routes in ``vllm serve``.

vLLM loads it only when it is named in ``VLLM_PLUGINS=drafttrain``.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from drafttrain.integrations.vllm.control import (
    DRAFTER,
    MAX_BODY_BYTES,
    STATUS,
    Answer,
    Conversation,
    handle,
    read_token,
)
from drafttrain.integrations.vllm.settings import engine_settings


class Routes:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "drafttrain"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._token: str | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(STATUS, self._handle, methods=["GET"])
        app.add_api_route(DRAFTER, self._handle, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Raises:
        ConfigError: the token file is unreadable or empty.
        """
        self._engine = engine_client
        settings = engine_settings(engine_client.vllm_config)
        self._token = read_token(settings.token_file if settings else None)

    async def _handle(self, request: Request) -> JSONResponse:
        conversation = handle(
            request.method,
            request.url.path,
            await _body(request),
            request.headers.get("authorization"),
            self._token,
        )
        answer = await self._held(conversation)
        return JSONResponse(answer.body, answer.status)

    async def _held(self, conversation: Conversation) -> Answer:
        try:
            call = next(conversation)
            while True:
                await asyncio.sleep(call.pause)
                replies = await self._engine.collective_rpc(call.method, args=call.args)
                call = conversation.send(replies)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


async def _body(request: Request) -> bytes:
    """The body, or as much of it as shows that it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            break
    return body


def endpoint_plugin() -> Routes:
    return Routes()
