"""Rows that hold text: prompt and completion, or a conversation.

=================================  =================================================================
columns                            meaning
=================================  =================================================================
``prompt``, and ``completion``     strings, continued as they stand; or two lists of messages, of
or ``response``                    which the policy wrote the second
``messages``                       a conversation: every assistant message is the policy's;
                                   ``tools`` are handed to the chat template
``conversations``                  the same with ``from`` and ``value`` (ShareGPT)
=================================  =================================================================
"""

from __future__ import annotations

from typing import Any

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import Conversation, Row, Sample, Text, maybe, take
from drafttrain.rollouts.sources.token_ids import facts

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


def recognises(row: Row) -> bool:
    has_completion = bool({"completion", "response"} & row.keys())
    return bool({"messages", "conversations"} & row.keys()) or ("prompt" in row and has_completion)


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a column is missing or malformed.
    """
    known = facts(row, where)
    tools = maybe(row, "tools", list, where)
    for field in ("messages", "conversations"):
        if field in row:
            return [Conversation(messages(row, field, where), known, tools)]
    answer = "completion" if "completion" in row else "response"
    if isinstance(row.get("prompt"), list):
        before = messages(row, "prompt", where)
        after = messages(row, answer, where)
        return [Conversation([*before, *after], known, tools, first=len(before))]
    return [Text(take(row, "prompt", str, where), take(row, answer, str, where), known)]


def messages(row: Row, field: str, where: str) -> list[dict[str, Any]]:
    """A list of chat messages, with roles as chat templates know them.

    Raises:
        RolloutError: it is something else.
    """
    return [_message(entry, field, where) for entry in take(row, field, list, where)]


def _message(entry: Any, field: str, where: str) -> dict[str, Any]:
    if isinstance(entry, dict) and isinstance(entry.get("from"), str) and "role" not in entry:
        role = _SHAREGPT_ROLES.get(entry["from"], entry["from"])
        entry = {"role": role, "content": entry.get("value")}
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise RolloutError(where, field, f"{entry!r:.60}; expected messages with a role")
    # Columnar files give every message every key: absent ones come as null.
    return {key: value for key, value in entry.items() if value is not None}
