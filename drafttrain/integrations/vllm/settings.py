"""What ``additional_config={"drafttrain": {...}}`` of a vLLM engine may say."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafttrain.config import explain
from drafttrain.errors import ConfigError

KEY = "drafttrain"
SWITCH_ON = (
    'start vLLM with additional_config={"drafttrain": {...}} '
    "(and VLLM_PLUGINS=drafttrain for `vllm serve`)"
)


def _own_name() -> str:
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    return f"{host or 'engine'}-{os.getpid()}"


class EngineSettings(BaseModel):
    """The engine side's settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spool: Path | None = None
    """Folder the tap writes rollouts to. None: no tap."""

    registry: Path | None = None
    """Registry root that drafter versions are loaded from. None: no swaps."""

    registry_name: str = "drafter"
    """The drafter's name in the registry."""

    token_file: Path | None = None
    """File with the bearer token that guards POST. None: ``DRAFTTRAIN_TOKEN`` if set, else open."""

    engine: str = Field(default_factory=_own_name, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """This engine's name in segments and rollout ids. Default: host name and process id."""

    capture: bool = True
    """Whether the tap captures from the start; ``drafttrain_capture`` changes it."""

    keep_fraction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of prompt groups whose rollouts are kept."""

    window_tokens: int | None = Field(default=None, ge=1)
    """Rows kept of a rollout: so many positions in a row, at a place drawn for each. None: all."""

    max_bytes_per_second: int | None = Field(default=None, ge=1)
    """Features kept a second, on average; above it new requests are not kept. None: no limit."""

    segment_tokens: int = Field(default=65_536, ge=1)
    """Tokens after which a segment is written; shorter ones are written for the reasons below."""

    idle_seconds: float = Field(default=0.5, gt=0)
    """How long finished rollouts wait for others while no request is running."""

    busy_seconds: float = Field(default=5.0, gt=0)
    """How long they wait at most while others run: each file costs the engine a little."""

    max_spool_bytes: int = Field(default=8 << 30, ge=1)
    """Above this many bytes of unread segments, whole rollouts are dropped and counted."""

    max_buffer_bytes: int = Field(default=4 << 30, ge=1)
    """Features of running requests held in host memory; above it whole rollouts are dropped."""


def engine_settings(vllm_config: Any) -> EngineSettings | None:
    """The settings in a ``VllmConfig``; None when drafttrain is not switched on.

    Raises:
        ConfigError: unknown key or wrong value; names it.
    """
    given = (vllm_config.additional_config or {}).get(KEY)
    if given is None:
        return None
    try:
        return EngineSettings.model_validate(given)
    except ValidationError as error:
        raise explain(error, f"additional_config.{KEY}", ConfigError) from error
