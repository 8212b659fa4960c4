"""vLLM's ``run-batch``, and other servers of the OpenAI batch API.

A line of output has custom_id and response.body.choices; with ``return_token_ids`` in the request
the body has the token ids of prompt and completion. Without them, the request is needed: give the
input file of the batch as well (``vllm/entrypoints/launchers/run_batch.py`` and
``vllm/entrypoints/openai/*/protocol.py``, vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import (
    Conversation,
    Facts,
    Row,
    Sample,
    Text,
    Tokens,
    finish_reason,
    integers,
    maybe,
    number,
    take,
)
from drafttrain.rollouts.sources.text import messages


def recognises(row: Row) -> bool:
    return {"custom_id", "response"} <= row.keys()


def is_request(row: Row) -> bool:
    """Whether a row is a line of a batch's input file."""
    return {"custom_id", "method", "body"} <= row.keys()


def convert(row: Row, where: str, requests: Mapping[str, dict[str, Any]]) -> list[Sample]:
    """One sample for each choice.

    Args:
        requests: custom_id to the body of the request, as far as input files were given.

    Raises:
        RolloutError: the request failed, or a field is missing or malformed.
    """
    name = take(row, "custom_id", str, where)
    response = maybe(row, "response", dict, where)
    if response is None or response.get("status_code", 200) != 200:
        raise RolloutError(where, "response", f"the request failed: {row.get('error')!r:.120}")
    body = take(response, "body", dict, where)
    request = requests.get(name)
    choices = take(body, "choices", list, where)
    if not choices:
        raise RolloutError(where, "choices", "none; expected one at least")
    return [_choice(choice, body, request, name, where) for choice in choices]


def _choice(
    choice: Any, body: Row, request: dict[str, Any] | None, name: str, where: str
) -> Sample:
    if not isinstance(choice, dict):
        raise RolloutError(where, "choices", "expected objects")
    facts = Facts(
        rollout_id=f"{name}-{choice.get('index', 0)}",
        temperature=None if request is None else number(request, "temperature", where),
        finish_reason=finish_reason(choice),
    )
    if choice.get("token_ids") is not None:
        # A chat answer names the prompt's ids once for all choices, a completion in each.
        holder = choice if choice.get("prompt_token_ids") is not None else body
        prompt = integers(holder, "prompt_token_ids", where)
        sampled = integers(choice, "token_ids", where)
        return Tokens([*prompt, *sampled], [False] * len(prompt) + [True] * len(sampled), facts)
    if request is None:
        problem = "no token ids, and no request of this id; give the batch's input file as well"
        raise RolloutError(where, "custom_id", problem)
    if "messages" in request:
        before = messages(request, "messages", where)
        answer = messages({"message": [choice.get("message")]}, "message", where)
        tools = maybe(request, "tools", list, where)
        return Conversation([*before, *answer], facts, tools, first=len(before))
    return Text(take(request, "prompt", str, where), take(choice, "text", str, where), facts)
