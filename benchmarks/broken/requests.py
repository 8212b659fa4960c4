"""Requests to the control route."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

RequestDamage = Callable[[random.Random], dict[str, Any]]


def _bodies(rng: random.Random) -> dict[str, Any]:
    versions: list[Any] = [
        None, True, "3", 0, -1, 1.5, 1e30, 10**30, [], {}, "../../etc", "v000002", [2], "latest",
    ]  # fmt: skip
    return {"json": {"version": rng.choice(versions)}}


def _no_version(rng: random.Random) -> dict[str, Any]:
    return {"json": rng.choice([{}, [], None, 3, "x", {"Version": 2}, {"versions": [2]}])}


def _unknown_version(rng: random.Random) -> dict[str, Any]:
    return {"json": {"version": rng.randint(1000, 999_999_999)}}


def _not_json(rng: random.Random) -> dict[str, Any]:
    bodies = [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 4000,
        b'{"version": 2',
        rng.randbytes(200),
        b"2" * 4000,
    ]
    return {"content": rng.choice(bodies)}


def _too_long(rng: random.Random) -> dict[str, Any]:
    return {"content": b'{"version": 2}' + b" " * rng.randint(5000, 2_000_000)}


def _bad_token(rng: random.Random) -> dict[str, Any]:
    wrong = ["", "Bearer", "Bearer wrong", "Basic dXNlcjpwYXNz", "Bearer " + "x" * 5000]
    return {"json": {"version": 1}, "headers": {"Authorization": rng.choice(wrong)}}


def _other_path(rng: random.Random) -> dict[str, Any]:
    paths = ["/drafttrain/../drafter", "/drafttrain/drafter/..", "/drafttrain/status", "/",
             "/drafttrain/%2e%2e/drafter", "/drafttrain/drafter/2", "//drafter"]  # fmt: skip
    return {"path": rng.choice(paths), "json": {"version": 1}}


REQUESTS: list[RequestDamage] = [
    *[_bodies] * 3, _no_version, _unknown_version, _not_json, _too_long, _bad_token, _other_path,
]  # fmt: skip
