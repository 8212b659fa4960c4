"""An in-process engine answers while it generates."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import publish
from engines import generate, greedy, prompts, status
from tiny_models import make_drafter, random_drafter

from drafttrain.checkpoints.registry import Registry
from drafttrain.errors import EngineError, EngineUnreachable
from drafttrain.integrations.vllm.client import EngineClient
from drafttrain.integrations.vllm.local import EngineServer, serve_engine, turnstile_of
from drafttrain.integrations.vllm.turnstile import Turnstile


@pytest.fixture(scope="module")
def server(engine: Any, registry: Registry) -> Iterator[EngineServer]:
    with serve_engine(engine) as server:
        yield server


@pytest.fixture
def client(server: EngineServer) -> Iterator[EngineClient]:
    with EngineClient(server.url, timeout=30) as client:
        yield client


def test_status_and_swap_over_http_and_directly(
    server: EngineServer, client: EngineClient, engine: Any
) -> None:
    assert client.swap(2).version == 2
    assert client.drafter_version() == server.status().drafter_version == 2
    assert client.status() == status(engine)
    assert server.swap(1).previous == 2
    with pytest.raises(EngineError, match=r"refused: .*999.*does not exist"):
        client.swap(999)
    with pytest.raises(EngineError, match="does not exist"):
        server.swap(999)
    assert client.drafter_version() == 1


def test_swaps_take_their_turn_during_generation(
    client: EngineClient, engine: Any, plain_engine: Any
) -> None:
    batch = prompts([5, 30, 61, 90, 14, 27, 8, 9], salt=40)
    expected = generate(plain_engine, batch, greedy(120))
    waited: list[float] = []
    done = threading.Event()

    def swap_until_done() -> None:
        while not done.is_set():
            started = time.perf_counter()
            client.swap(1 + len(waited) % 2)
            waited.append(time.perf_counter() - started)

    thread = threading.Thread(target=swap_until_done)
    thread.start()
    try:
        found = [generate(engine, batch, greedy(120))]
        while len(waited) < 3 and thread.is_alive():
            found.append(generate(engine, batch, greedy(120)))
    finally:
        done.set()
        thread.join()
    assert all(completions == expected for completions in found)
    assert len(waited) >= 3
    assert max(waited) < 5
    client.swap(1)


def test_the_token_guards_swaps_only(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DRAFTTRAIN_TOKEN", "secret-word")
    with serve_engine(engine) as guarded:
        assert EngineClient(guarded.url).status().method == "eagle3"
        for token in (None, "wrong"):
            with pytest.raises(EngineError, match="bearer token"):
                EngineClient(guarded.url, token=token).swap(2)
        assert EngineClient(guarded.url, token="secret-word").swap(1).version == 1
    assert "secret-word" not in caplog.text


def test_hostile_requests_get_an_answer(server: EngineServer) -> None:
    url = f"{server.url}/drafttrain/drafter"
    assert httpx.post(url, content=b"x" * 100_000).status_code == 400
    assert httpx.post(url, headers={"Content-Length": "0"}).status_code == 400
    assert httpx.get(f"{server.url}/").status_code == 404


def test_the_client_says_what_is_missing(plain_engine: Any) -> None:
    with serve_engine(plain_engine) as without:
        with pytest.raises(EngineError, match="VLLM_PLUGINS=drafttrain"):
            EngineClient(without.url).status()
        with pytest.raises(EngineError, match="additional_config"):
            without.status()
    with pytest.raises(EngineUnreachable, match="no answer"):
        EngineClient(without.url, timeout=2).status()
    with pytest.raises(EngineUnreachable):
        EngineClient("not a url").status()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"schema_version": 2}'])
def test_the_client_refuses_another_schema(body: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(EngineError):
            EngineClient(f"http://127.0.0.1:{server.server_port}").status()
    finally:
        server.shutdown()
        server.server_close()


def test_rollouts_ended_by_a_stop_string_are_seen_when_the_engine_goes_idle(
    server: EngineServer, engine: Any
) -> None:
    """The front end aborts them; only an empty step tells the worker."""
    core = engine.llm_engine
    core.add_request("to-be-aborted", {"prompt_token_ids": prompts([12], 41)[0]}, greedy(200))
    core.add_request("short", {"prompt_token_ids": prompts([13], 42)[0]}, greedy(4))
    core.step()
    core.abort_request(["to-be-aborted"])
    while core.has_unfinished_requests():
        core.step()
    assert status(engine).tap.running == 0


def test_the_empty_step_that_settles_is_part_of_the_turn(
    server: EngineServer, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine.llm_engine.engine_core.engine_core
    step, owners = core.step_fn, []

    def watched() -> Any:
        owners.append(turnstile_of(engine.llm_engine)._owner)
        return step()

    monkeypatch.setattr(core, "step_fn", watched)
    generate(engine, prompts([12], salt=43), greedy(4))
    assert set(owners) == {threading.get_ident()}


def test_the_turnstile_lets_a_waiter_in_after_one_turn() -> None:
    turnstile, turns, stop = Turnstile(), 0, threading.Event()

    def loop() -> None:
        nonlocal turns
        while not stop.is_set():
            with turnstile.turn(), turnstile.turn():  # a turn may be taken within a turn
                turns += 1
                time.sleep(0.001)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        for _ in range(20):
            time.sleep(0.005)
            seen = turns
            with turnstile.turn():
                assert turns <= seen + 2
    finally:
        stop.set()
        thread.join()


def test_a_turn_ends_with_an_error() -> None:
    turnstile = Turnstile()

    class Owner:
        def fail(self) -> None:
            raise RuntimeError

    owner = Owner()
    turnstile.guard(owner, "fail")
    for _ in range(2):
        with pytest.raises(RuntimeError):
            owner.fail()


def test_a_version_published_later_can_be_swapped_in(
    client: EngineClient, registry: Registry, policy: Path, tmp_path: Path
) -> None:
    version = publish(registry, make_drafter(tmp_path / "later", random_drafter(9)), policy)
    assert client.swap(version).version == version
    assert client.swap(1).previous == version


# In a process of its own: an AsyncLLM always starts an engine process, which imports the main
# module again.
ASYNC = """
import asyncio, json, sys

async def main(policy, drafter, registry, prompt, expected):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from drafttrain.integrations.vllm.client import EngineClient
    from drafttrain.integrations.vllm.local import serve_engine

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=policy, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
        block_size=32, skip_tokenizer_init=True, num_gpu_blocks_override=200,
        speculative_config={"method": "eagle3", "model": drafter, "num_speculative_tokens": 3},
        additional_config={"drafttrain": {"registry": registry, "engine": "async"}},
    ))
    params = SamplingParams(temperature=0, max_tokens=len(expected), detokenize=False)

    async def complete(name):
        async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    with serve_engine(engine) as server:
        client = EngineClient(server.url)
        running = [asyncio.create_task(complete(f"r{i}")) for i in range(4)]
        swapped = [(await asyncio.to_thread(client.swap, 1 + i % 2)).version for i in range(4)]
        direct = (await asyncio.to_thread(server.swap, 1)).previous
        outputs = await asyncio.gather(*running)
        serving = (await asyncio.to_thread(server.status)).drafter_version
    engine.shutdown()
    print(json.dumps([swapped, direct, serving, all(o == expected for o in outputs)]))

if __name__ == "__main__":
    asyncio.run(main(*json.loads(sys.argv[1])))
"""


def test_an_async_engine_is_swapped_while_it_generates(
    policy: Path, start_drafter: Path, registry: Registry, plain_engine: Any, tmp_path: Path
) -> None:
    (prompt,) = prompts([14], salt=44)
    (expected,) = generate(plain_engine, [prompt], greedy(120))
    (tmp_path / "main.py").write_text(ASYNC)
    given = [str(policy), str(start_drafter), str(registry.root), prompt, expected]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), json.dumps(given)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[1, 2, 1, 2], 2, 1, True]
