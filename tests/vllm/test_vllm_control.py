"""The control routes as text: what they accept, refuse and never say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drafttrain.errors import ConfigError
from drafttrain.integrations.vllm.control import (
    DRAFTER,
    STATUS,
    Answer,
    Call,
    handle,
    read_token,
    run,
)
from drafttrain.integrations.vllm.settings import engine_settings
from drafttrain.integrations.vllm.versions import PolicyVersion

TOKEN = "correct-horse"


class Workers:
    """Two workers, and what they were asked."""

    def __init__(self, *replies: list[dict[str, Any]]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, call: Call) -> list[dict[str, Any]]:
        self.asked.append((call.method, *call.args))
        return self.replies.pop(0)


def ask(method: str, path: str, body: bytes = b"", workers: Workers | None = None) -> Answer:
    return run(handle(method, path, body, None, None), workers or Workers())


def post(body: bytes, authorization: str | None = None, token: str | None = None) -> Answer:
    return run(handle("POST", DRAFTER, body, authorization, token), Workers())


def test_status_asks_once_and_needs_no_token() -> None:
    workers = Workers([{"engine": "a"}, {"engine": "a"}])
    answer = run(handle("GET", STATUS, b"", None, TOKEN), workers)
    assert answer == Answer(200, {"engine": "a"})
    assert workers.asked == [("drafttrain_status",)]


def test_a_swap_waits_until_every_worker_has_read_the_version() -> None:
    ready, reading, done = {"ready": True}, {"ready": False}, {"version": 3}
    workers = Workers([reading, reading], [ready, reading], [ready, ready], [done, done])
    authorized = handle("POST", DRAFTER, b'{"version": 3}', f"Bearer {TOKEN}", TOKEN)
    assert run(authorized, workers) == Answer(200, done)
    assert workers.asked == [("drafttrain_prepare", 3)] * 3 + [("drafttrain_swap", 3)]


def test_one_refusing_worker_is_a_refusal() -> None:
    no, ready = {"error": "no", "status": 422}, {"ready": True}
    refused = Answer(422, {"error": "no"})
    body = b'{"version": 3}'
    assert ask("POST", DRAFTER, body, Workers([ready, no])) == refused
    assert ask("POST", DRAFTER, body, Workers([ready, ready], [{"version": 3}, no])) == refused
    assert ask("GET", STATUS, b"", Workers([no])) == refused


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", TOKEN, f"Basic {TOKEN}", "Bearer é"]
)
def test_a_wrong_token_is_refused_before_the_body_is_read(authorization: str | None) -> None:
    reply = post(b"not json", authorization, TOKEN)
    assert reply.status == 401
    assert TOKEN not in str(reply.body)


@pytest.mark.parametrize(
    "body",
    [b"", b"3", b"{}", b"[" * 4000, b"\xff", b'{"version": "3"}', b'{"version": true}',
     b'{"version": 0}', b'{"version": -1}', b'{"version": 3.0}', b'{"version": 1e9}',
     b'{"version": 1000000000}', b'{"version": 3}' + b" " * 5000,
     b'{"version": ' + b"9" * 4080 + b"}"],
)  # fmt: skip
def test_a_body_without_a_version_is_refused(body: bytes) -> None:
    assert post(body).status == 400


def test_other_routes_do_not_exist() -> None:
    for method, path in (("POST", STATUS), ("GET", DRAFTER), ("GET", "/drafttrain/../etc")):
        assert ask(method, path).status == 404


def test_tokens_come_from_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRAFTTRAIN_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("DRAFTTRAIN_TOKEN", "from-outside\n")
    assert read_token(None) == "from-outside"
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(file)
    file.write_text("  \n")
    with pytest.raises(ConfigError, match="empty"):
        read_token(file)
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN


@pytest.mark.parametrize("token", ["first\nsecond", "two words", "schlüssel", "bell\a"])
def test_a_token_that_no_header_can_carry_is_refused_and_never_shown(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("DRAFTTRAIN_TOKEN", token)
    for source, named in ((tmp_path / "token", str(tmp_path)), (None, "DRAFTTRAIN_TOKEN")):
        with pytest.raises(ConfigError, match="printable ASCII") as refused:
            read_token(source)
        assert named in str(refused.value)
        assert token[:4] not in str(refused.value).replace(str(tmp_path), "")


def test_settings_refuse_what_they_do_not_know() -> None:
    def settings(**given: Any) -> Any:
        return engine_settings(SimpleNamespace(additional_config={"drafttrain": given}))

    assert engine_settings(SimpleNamespace(additional_config={})) is None
    assert settings().capture
    for wrong in ({"spol": "x"}, {"engine": "a/b"}, {"segment_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            settings(**wrong)


def test_a_policy_version_never_goes_back() -> None:
    from drafttrain.errors import EngineError

    version = PolicyVersion()
    assert version.number == 0
    for _ in range(3):  # buckets of one update
        version.touch()
    assert version.number == version.number == 1
    version.touch()
    version.set(5)  # names the weights as they are
    assert version.number == 5
    with pytest.raises(EngineError, match="older"):
        version.set(4)
