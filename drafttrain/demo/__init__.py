"""The demo: a small RL job of our own, with the whole loop beside it on a real vLLM engine.

``task`` says what the policy must do, ``policy`` trains one from nothing, ``grpo`` moves it,
``arms`` are the engines, ``run`` tells the story in order, ``checks`` and ``report`` end it.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path

from drafttrain.errors import DrafttrainError

# Read when torch and vLLM are first imported, so before any import that brings them.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines in this process: no core lost to waiting
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def run_demo(out: Path, rl_steps: int | None, seed: int) -> None:
    """Run the demo into `out`.

    Raises:
        DrafttrainError: something it needs is missing, such as vLLM.
    """
    if find_spec("vllm") is None:
        raise DrafttrainError("vLLM is not installed; the README says how to install it")
    os.environ.update(ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning)  # vLLM's, at every import
    from drafttrain.demo.run import Demo

    Demo(out, seed=seed, **({} if rl_steps is None else {"rl_steps": rl_steps})).run()
