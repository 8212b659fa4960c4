"""Writes the files beside it as their original writers would; run it to make them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import msgpack
import pyarrow
import pyarrow.parquet

HERE = Path(__file__).parent
WORDS = ["<pad>", "<eos>", "<user>", "<bot>", "add", "one", "two", "three", "is", "so", "wait"]
PROMPT = "add one two"
ANSWERS = ["one two is three", "so three"]
PROMPT_IDS = [4, 5, 6]
ANSWER_IDS = [[5, 6, 8, 7, 1], [9, 7, 1]]
REWARDS = [1.0, 0.0]


def write_lines(name: str, rows: list[dict[str, Any]]) -> None:
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trl() -> None:
    path = HERE / "trl/completions/completions_00010.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "step": [10, 10],
        "prompt": [PROMPT, PROMPT],
        "completion": ANSWERS,
        "accuracy_reward": REWARDS,
        "advantage": [0.7, -0.7],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def verl() -> None:
    rows = [
        {"input": PROMPT, "output": answer, "gts": "three", "score": score, "step": 10, "acc": 1}
        for answer, score in zip(ANSWERS, REWARDS, strict=True)
    ]
    write_lines("verl/10.jsonl", rows)


def openrlhf() -> None:
    pairs = zip(ANSWERS, REWARDS, strict=True)
    rows = [{"input": PROMPT, "output": answer, "reward": reward} for answer, reward in pairs]
    write_lines("openrlhf/output.jsonl", rows)


def nemo_rl() -> None:
    width = 10
    rows = []
    for index, (answer, reward) in enumerate(zip(ANSWER_IDS, REWARDS, strict=True)):
        ids = PROMPT_IDS + answer
        padding = [0] * (width - len(ids))
        rows.append(
            {
                "content": [f"{PROMPT} {ANSWERS[index]}"],
                "rewards": [reward],
                "input_lengths": [len(ids)],
                "token_ids": [ids + padding],
                "token_loss_mask": [[0] * len(PROMPT_IDS) + [1] * len(answer) + padding],
                "sample_loss_mask": [1.0],
                "advantages": [[0.0] * width],
                "generation_logprobs": [[0.0] * width],
                "prev_logprobs": [[0.0] * width],
                "idx": index,
            }
        )
    write_lines("nemo_rl/train_data_step10.jsonl", rows)


def prime_rl() -> None:
    sequences = [PROMPT_IDS + answer for answer in ANSWER_IDS]
    masks = [[False] * len(PROMPT_IDS) + [True] * len(answer) for answer in ANSWER_IDS]
    padding = 2
    tokens = [token for ids in sequences for token in ids] + [1] * padding
    lengths = [len(sequences[0]), len(sequences[1]) + padding]
    names = ["adding"] * (len(tokens) - padding) + [""] * padding
    batch = [
        tokens,
        [entry for mask in masks for entry in mask] + [False] * padding,
        [0.0] * len(tokens),
        [0.0] * len(tokens),
        [position for length in lengths for position in range(length)],
        lengths,
        [0.7] * (len(tokens) - padding) + [1.0] * padding,
        names,
        lengths,
    ]
    path = HERE / "prime_rl/rollouts/step_10/rank_0.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgpack.packb([batch]))


def slime() -> None:
    rows = [
        {
            "group_index": 0,
            "index": index,
            "prompt": PROMPT,
            "tokens": PROMPT_IDS + answer,
            "response": ANSWERS[index],
            "response_length": len(answer),
            "reward": REWARDS[index],
            "loss_mask": [1] * len(answer),
            "status": "completed",
        }
        for index, answer in enumerate(ANSWER_IDS)
    ]
    write_lines("slime/samples.jsonl", rows)


def vllm() -> None:
    message = {"role": "user", "content": PROMPT}
    body = {"model": "policy", "messages": [message], "temperature": 0.7, "n": 2}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    write_lines("vllm/requests.jsonl", [request])

    def result(prompt_ids: list[int] | None, answer_ids: list[Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": ANSWERS[index], "refusal": None},
                "finish_reason": "stop",
                "token_ids": answer_ids[index],
            }
            for index in range(2)
        ]
        body = {"object": "chat.completion", "choices": choices, "prompt_token_ids": prompt_ids}
        response = {"status_code": 200, "request_id": "r", "body": body}
        return {"id": "vllm-1", "custom_id": "a", "response": response, "error": None}

    write_lines("vllm/results.jsonl", [result(None, [None, None])])
    write_lines("vllm/results_with_ids.jsonl", [result([2, *PROMPT_IDS, 3], ANSWER_IDS)])


def hf_datasets() -> None:
    rows = [{"prompt_token_ids": PROMPT_IDS, "completion_token_ids": ids} for ids in ANSWER_IDS]
    datasets.Dataset.from_list(rows).save_to_disk(str(HERE / "datasets"))


if __name__ == "__main__":
    write_lines("words.json", [{word: index for index, word in enumerate(WORDS)}])
    for write in (trl, verl, openrlhf, nemo_rl, prime_rl, slime, vllm, hf_datasets):
        write()
