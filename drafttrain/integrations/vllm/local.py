"""The control routes for an engine that its owner drives from Python: ``LLM`` or ``AsyncLLM``.

    with serve_engine(llm) as server:
        EngineClient(server.url).swap(3)                # from anywhere
        server.swap(3)                                  # from this process, beside an LLM
        await asyncio.to_thread(server.swap, 3)         # beside an AsyncLLM, in its event loop

Calls run between two engine steps, after at most one. The owner of an ``LLM`` is busy in
``generate``, so they run in the caller's thread; those of an ``AsyncLLM`` in its event loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from drafttrain.errors import EngineError
from drafttrain.integrations.vllm.control import (
    MAX_BODY_BYTES,
    Answer,
    Call,
    Conversation,
    Replies,
    handle,
    read_token,
    run,
    status,
    swap,
)
from drafttrain.integrations.vllm.messages import EngineStatus, SwapResult
from drafttrain.integrations.vllm.settings import engine_settings
from drafttrain.integrations.vllm.turnstile import Turnstile

# What touches the engine: its steps, and calls of worker methods, ours as well as the RL job's.
_GUARDED = ("step", "collective_rpc", "sleep", "wake_up")
_TURNSTILE = "_drafttrain_turnstile"

# A connection that says nothing for so long is closed.
_SILENT_SECONDS = 30.0

# Engines that compute in this process share modules: vLLM keeps one rotary embedding for all models
# that want the same (``rotary_embedding/__init__.py``, ``_ROPE_DICT``), and a layerwise reload puts
# it on the meta device for a moment. So while one of them swaps, no other may step.
_IN_THIS_PROCESS = Turnstile()


Rpc = Callable[[Call], Replies]


class EngineServer:
    """Serves one engine until it is closed; the engine itself is left running."""

    def __init__(self, rpc: Rpc, token: str | None, host: str, port: int) -> None:
        self._rpc = rpc
        self._server = _Server((host, port), _handler(self._hold, token))
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="drafttrain-http", daemon=True
        )
        self._thread.start()
        bound_host, bound_port = self._server.server_address[:2]
        self.url = f"http://{bound_host!s}:{bound_port}"

    def status(self) -> EngineStatus:
        """As ``GET /drafttrain/status``.

        Raises:
            EngineError: drafttrain is not switched on.
        """
        return EngineStatus.model_validate(self._body(status()))

    def swap(self, version: int) -> SwapResult:
        """As ``POST /drafttrain/drafter``.

        Raises:
            EngineError: refused, with the reason; the old drafter serves on.
        """
        return SwapResult.model_validate(self._body(swap(version)))

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> EngineServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hold(self, conversation: Conversation) -> Answer:
        return run(conversation, self._rpc)

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        answer = self._hold(conversation)
        if answer.status != 200:
            raise EngineError(answer.body["error"])
        return answer.body


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's fault; anything else is printed as it would be."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def serve_engine(llm: Any, host: str = "127.0.0.1", port: int = 0) -> EngineServer:
    """Serves the control routes of an engine from a daemon thread.

    Args:
        llm: a ``vllm.LLM``, with or without an engine process of its own, or an ``AsyncLLM``; for
            that one call this in its event loop.
        host: to listen on.
        port: 0 picks a free one; see ``EngineServer.url``.

    Raises:
        ConfigError: the token file is unreadable or empty.
        OSError: the port is taken.
    """
    engine = llm.llm_engine if hasattr(llm, "llm_engine") else llm
    settings = engine_settings(engine.vllm_config)
    token = read_token(settings.token_file if settings else None)
    rpc = _rpc(engine) if engine is not llm else _rpc_in_loop(engine, asyncio.get_running_loop())
    return EngineServer(rpc, token, host, port)


def _rpc(engine: Any) -> Rpc:
    turnstile_of(engine)

    def call_workers(call: Call) -> Replies:
        replies: Replies = engine.collective_rpc(call.method, args=call.args)
        return replies

    return call_workers


def _rpc_in_loop(engine: Any, loop: asyncio.AbstractEventLoop) -> Rpc:
    def call_workers(call: Call) -> Replies:
        asked = engine.collective_rpc(call.method, args=call.args)
        replies: Replies = asyncio.run_coroutine_threadsafe(asked, loop).result()
        return replies

    return call_workers


def turnstile_of(engine: Any) -> Turnstile:
    """The turns of an ``LLM``'s engine; every call of the methods that touch it takes one."""
    turnstile: Turnstile | None = getattr(engine, _TURNSTILE, None)
    if turnstile is None:
        computes_here = hasattr(engine.engine_core, "engine_core")
        turnstile = _IN_THIS_PROCESS if computes_here else Turnstile()
        _settle_when_idle(engine)
        for name in _GUARDED:
            turnstile.guard(engine, name)
        setattr(engine, _TURNSTILE, turnstile)
    return turnstile


def _settle_when_idle(engine: Any) -> None:
    """Tells the workers about requests that ended in the last step.

    An engine in its own process takes an empty step for that (``EngineCore.has_work`` counts
    finished requests). One in this process is not stepped again before the next ``generate``: a
    rollout ended by a stop string would wait for it.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    if core is None:
        return
    step = engine.step

    def step_and_settle() -> Any:
        outputs = step()
        scheduler = core.scheduler
        if scheduler.has_finished_requests() and not scheduler.has_unfinished_requests():
            core.step_fn()
        return outputs

    engine.step = step_and_settle


def _handler(
    hold: Callable[[Conversation], Answer], token: str | None
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SILENT_SECONDS

        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def _reply(self) -> None:
            length = self.headers.get("Content-Length", "0")
            size = min(int(length), MAX_BODY_BYTES + 1) if length.isdigit() else 0
            path = self.path.partition("?")[0]
            authorization = self.headers.get("Authorization")
            body = self.rfile.read(size)
            if len(body) < size:
                return  # cut off on the way: nothing was asked for
            reply = hold(handle(self.command, path, body, authorization, token))
            content = json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: the engine's log is not an access log."""

    return Handler
