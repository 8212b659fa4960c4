"""What loads where: the plugin in every process of vLLM, the client beside a trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOM = "drafttrain.integrations.vllm"


def modules_after(statement: str) -> set[str]:
    program = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["plugin", "client"])
def test_importing_is_light(module: str) -> None:
    loaded = modules_after(f"import {ROOM}.{module}")
    assert not loaded & {"torch", "vllm", "transformers", "fastapi", "drafttrain.drafters"}
