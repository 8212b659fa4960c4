"""Saved rollouts of every known tool are read alike, and what makes no sense is named."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_files import HIDDEN, NO_AUX
from samples.make_samples import ANSWER_IDS, PROMPT_IDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drafttrain.errors import RolloutError
from drafttrain.rollouts.record import prompt_group, sampled_runs
from drafttrain.rollouts.sources import Encoder, Reading, read_rollouts
from drafttrain.rollouts.spool import SpoolWriter

SAMPLES = Path(__file__).parent / "samples"
WORDS: dict[str, int] = json.loads((SAMPLES / "words.json").read_text())
APPENDING = (
    "{% for m in messages %}"
    "{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} <eos> wait "
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
# Earlier answers lose the word "so", as reasoning is dropped by some templates.
FORGETTING = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
    "{{ m.content if loop.last else m.content.replace('so ', '') }} <eos> "
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "add one"},
    {"role": "assistant", "content": "so one"},
    {"role": "user", "content": "add two"},
    {"role": "assistant", "content": "so three"},
]
ROW = {"prompt_token_ids": [4, 5], "completion_token_ids": [5, 1]}


def tokenizer(template: str | None = APPENDING) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", chat_template=template
    )


def encoder(template: str | None = APPENDING, max_length: int | None = None) -> Encoder:
    return Encoder(lambda: tokenizer(template), vocab_size=len(WORDS), max_length=max_length)


ENCODER = encoder()


def read(*paths: Path, skip_malformed: bool = False, **options: Any) -> Reading:
    return read_rollouts(paths, encoder(**options), skip_malformed=skip_malformed)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def words_of(tokens: torch.Tensor) -> str:
    names = {index: word for word, index in WORDS.items()}
    return " ".join(names[int(token)] for token in tokens)


@pytest.mark.parametrize(
    ("sample", "with_eos"),
    [
        ("trl/completions", False),
        ("verl", False),
        ("openrlhf", False),
        ("nemo_rl", True),
        ("prime_rl", True),
        ("slime", True),
        ("datasets", True),
    ],
)
def test_every_tool_left_the_same_two_rollouts(sample: str, with_eos: bool) -> None:
    rollouts = read(SAMPLES / sample).rollouts
    expected = [ids if with_eos else ids[:-1] for ids in ANSWER_IDS]
    for rollout, answer in zip(rollouts, expected, strict=True):
        assert rollout.tokens.tolist() == PROMPT_IDS + answer
        assert rollout.generated.tolist() == [False] * len(PROMPT_IDS) + [True] * len(answer)
        assert rollout.facts.group == prompt_group(PROMPT_IDS)


@pytest.mark.parametrize("sample", ["verl", "openrlhf", "nemo_rl", "slime"])
def test_rewards_are_kept(sample: str) -> None:
    assert [rollout.facts.reward for rollout in read(SAMPLES / sample).rollouts] == [1.0, 0.0]


def test_facts_of_prime_rl() -> None:
    facts = [rollout.facts for rollout in read(SAMPLES / "prime_rl").rollouts]
    assert [(f.domain, f.policy_version, f.temperature) for f in facts] == [("adding", 10, 0.7)] * 2


def test_text_without_special_tokens_is_counted() -> None:
    assert read(SAMPLES / "trl").text_without_specials == 2
    assert read(SAMPLES / "openrlhf").text_without_specials == 0


def test_a_batch_with_ids_needs_no_requests(tmp_path: Path) -> None:
    rollouts = read(SAMPLES / "vllm" / "results_with_ids.jsonl").rollouts
    assert [r.tokens.tolist() for r in rollouts] == [[2, *PROMPT_IDS, 3, *a] for a in ANSWER_IDS]
    assert [r.facts.finish_reason for r in rollouts] == ["stop", "stop"]


def test_a_batch_without_ids_takes_its_requests(tmp_path: Path) -> None:
    for name in ("requests.jsonl", "results.jsonl"):
        shutil.copy(SAMPLES / "vllm" / name, tmp_path)
    rollouts = read(tmp_path).rollouts
    assert [words_of(r.tokens[r.prompt_length :]) for r in rollouts] == [
        "one two is three <eos>",
        "so three <eos>",
    ]
    assert {r.facts.temperature for r in rollouts} == {0.7}
    with pytest.raises(RolloutError, match=r"results.jsonl:1: custom_id: .*input file"):
        read(tmp_path / "results.jsonl")


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows = [
        {"prompt_token_ids": [4, 5], "completion_token_ids": [5, 1], "id": "a", "temperature": 0.5},
        {"prompt_token_ids": [4], "completion_token_ids": [6, 7], "id": "b", "temperature": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    table = read(tmp_path / "r.parquet").rollouts
    text = read(lines(tmp_path / "r.jsonl", *rows)).rollouts
    assert [r.tokens.tolist() for r in table] == [r.tokens.tolist() for r in text]
    assert [r.facts for r in table] == [r.facts for r in text]


def test_a_conversation_is_one_rollout_with_a_mask(tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", {"messages": TURNS, "domain": "adding"})
    (rollout,) = read(path).rollouts
    # What the template adds after the end of a turn was not sampled.
    assert words_of(rollout.tokens) == (
        "<user> add one <eos> wait <bot> so one <eos> wait "
        "<user> add two <eos> wait <bot> so three <eos>"
    )
    assert words_of(rollout.tokens[rollout.generated]) == "so one <eos> so three <eos>"
    assert rollout.facts.domain == "adding"


def test_a_template_that_forgets_gives_one_rollout_for_each_answer(tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", {"messages": TURNS, "id": "x"})
    first, second = read(path, template=FORGETTING).rollouts
    assert words_of(first.tokens) == "<user> add one <eos> <bot> so one <eos>"
    assert words_of(second.tokens).startswith("<user> add one <eos> <bot> one <eos> <user>")
    assert words_of(second.tokens[second.generated]) == "so three <eos>"
    assert [first.facts.rollout_id, second.facts.rollout_id] == ["x-answer0", "x-answer1"]


def test_only_the_completion_of_prompt_messages_is_sampled(tmp_path: Path) -> None:
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    (rollout,) = read(lines(tmp_path / "r.jsonl", row)).rollouts
    assert words_of(rollout.tokens[rollout.generated]) == "so three <eos>"


def test_sharegpt_and_labels(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "add one"}, {"from": "gpt", "value": "so one"}]
    (chat,) = read(lines(tmp_path / "c.jsonl", {"conversations": turns})).rollouts
    assert words_of(chat.tokens[chat.generated]) == "so one <eos>"
    row = {"input_ids": [4, 5, 9, 5], "labels": [-100, -100, 9, 5]}
    (labelled,) = read(lines(tmp_path / "l.jsonl", row)).rollouts
    assert labelled.generated.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{nonsense", "line: is not JSON"),
        ("[1]", "line: list"),
        ({"a": 1}, "columns: a; no known format"),
        ({"prompt_token_ids": [1]}, "completion_token_ids: missing"),
        ({"prompt_token_ids": [1], "completion_token_ids": ["x"]}, "completion_token_ids: exp"),
        ({"prompt_token_ids": [1], "completion_token_ids": [99]}, "tokens: id 99"),
        ({"prompt_token_ids": [1], "completion_token_ids": [-1]}, "tokens: id -1"),
        ({"prompt_token_ids": [1], "completion_token_ids": []}, "tokens: none of them"),
        ({"prompt_token_ids": [], "completion_token_ids": [1]}, "tokens: no prompt"),
        ({"input_ids": [1, 2], "loss_mask": [0]}, "loss_mask: expected 2"),
        ({"messages": [{"content": "x"}]}, "messages: "),
        ({"messages": TURNS[:1]}, "messages: no assistant"),
        ({"tokens": [1, 2], "response_length": 5}, "response_length: 5 of 2"),
        ({"custom_id": "a", "response": None, "error": "gone"}, "response: the request failed"),
        (ROW | {"temperature": math.nan}, "temperature: nan; expected a finite"),
        (ROW | {"temperature": math.inf}, "temperature: inf; expected a finite"),
        (ROW | {"temperature": 10**400}, "temperature: inf; expected a finite"),
        (ROW | {"temperature": 1e-320}, "temperature: 1e-320; expected 0 (greedy)"),
        (ROW | {"temperature": -1}, "temperature: -1.0; expected 0 (greedy)"),
        (ROW | {"reward": 10**400}, "reward: inf; expected a finite"),
        ({"tokens": [4, 5], "response_length": 1, "reward": 10**400}, "reward: inf"),
        ({"tokens": [4, 5], "response_length": 1, "status": ["x"]}, "status: ['x']; expected str"),
        ({"conversations": [{"from": ["x"], "value": "a"}]}, "conversations: {'from': ['x']"),
        ({"prompt": "add", "completion": "\udfff"}, "completion: half of a surrogate pair"),
        ({"messages": TURNS, "tools": [1]}, "tools: expected a list of objects"),
        ({"custom_id": "a", "response": {"body": {"choices": []}}}, "choices: none; expected one"),
        ({"messages": TURNS[1:]}, "messages: the chat template refused"),
    ],
)
def test_a_malformed_row_is_named_and_skipped_only_on_demand(
    tmp_path: Path, row: Any, problem: str
) -> None:
    path = lines(tmp_path / "r.jsonl", ROW, row, ROW)
    with pytest.raises(RolloutError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: {problem}")
    reading = read(path, skip_malformed=True)
    assert (len(reading.rollouts), reading.skipped) == (2, 1)
    assert reading.reasons == [str(caught.value)]


@pytest.mark.parametrize("temperature", ["x", None, True, math.nan])
def test_a_temperature_of_prime_rl_that_is_none(tmp_path: Path, temperature: Any) -> None:
    path = tmp_path / "step_1" / "rank_0.bin"
    path.parent.mkdir()
    batch = [[4, 5], [False, True], [0, 0], [0, 0], [0, 1], [2], [temperature] * 2, ["a", "a"]]
    path.write_bytes(msgpack.packb([batch]))
    with pytest.raises(RolloutError, match=r"rank_0\.bin:1: temperatures: "):
        read(path)


def test_a_temperature_of_0_is_kept(tmp_path: Path) -> None:
    (rollout,) = read(lines(tmp_path / "r.jsonl", ROW | {"temperature": 0})).rollouts
    assert rollout.facts.temperature == 0


@pytest.mark.parametrize("reason", ["tool_calls", "repetition", {"type": "stop"}, 3])
def test_however_a_rollout_ended_it_can_be_kept(tmp_path: Path, reason: object) -> None:
    """Servers have more words for it than a spool, and what they mean by them is not known."""
    rows = [ROW | {"finish_reason": reason}, _first("vllm/results_with_ids.jsonl")]
    for choice in rows[1]["response"]["body"]["choices"]:
        choice["finish_reason"] = reason
    for row in rows:
        for rollout in read(lines(tmp_path / "r.jsonl", row)).rollouts:
            found = rollout.with_features(torch.zeros(rollout.length, HIDDEN), None)
            SpoolWriter(tmp_path / "spool", "teacher").write([found], NO_AUX)
            assert found.finish_reason is None


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "r.jsonl")
    with pytest.raises(RolloutError, match=r"r\.jsonl: rollouts: none found"):
        read(path)


def _first(sample: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((SAMPLES / sample).read_text().splitlines()[0])
    return row


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(),
        st.text(st.characters(exclude_categories=())),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SOUND_ROWS = [
    ROW | {"completion_mask": [1, 1], "temperature": 1.0, "reward": 1.0, "policy_version": 1},
    {"input_ids": [4, 5], "labels": [-100, 5], "id": 1, "group": "g", "domain": "d"},
    {"prompt": "add one", "completion": "so one", "finish_reason": "stop"},
    {"prompt": TURNS[:1], "response": TURNS[1:2], "tools": [{}]},
    {"messages": TURNS, "tools": [{}]},
    {"conversations": [{"from": "human", "value": "add"}, {"from": "gpt", "value": "one"}]},
    {"step": 1, "prompt": "add one", "completion": "so one", "advantage": 0.0},
    _first("verl/10.jsonl"),
    _first("openrlhf/output.jsonl"),
    _first("nemo_rl/train_data_step10.jsonl"),
    _first("slime/samples.jsonl"),
    _first("vllm/results_with_ids.jsonl"),
]


def _perhaps_damaged(value: Any) -> st.SearchStrategy[Any]:
    """The value, or with one or more parts of it replaced, at any depth."""
    whole: st.SearchStrategy[Any] = st.just(value)
    if isinstance(value, dict):
        whole = st.fixed_dictionaries({key: _perhaps_damaged(part) for key, part in value.items()})
    elif isinstance(value, list):
        whole = st.tuples(*map(_perhaps_damaged, value)).map(list)
    return whole if isinstance(value, dict) else whole | JSON


@given(st.one_of([_perhaps_damaged(row) for row in SOUND_ROWS]))
@settings(max_examples=200, deadline=None)
def test_any_row_gives_a_rollout_or_a_rollout_error(row: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = lines(Path(folder) / "r.jsonl", ROW, row)
        reading = read_rollouts([path], ENCODER, skip_malformed=True)
    assert len(reading.rollouts) + reading.skipped >= 2
    assert all(reason.startswith(f"{path}:2: ") for reason in reading.reasons)


def test_longer_than_the_policys_context(tmp_path: Path) -> None:
    path = lines(tmp_path / "r.jsonl", {"prompt_token_ids": [4], "completion_token_ids": [5] * 9})
    with pytest.raises(RolloutError, match="10; the policy's longest context is 8"):
        read(path, max_length=8)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"rollout_id": 0, "samples": [Bomb()]}, tmp_path / "data_0.pt")
    for path in (tmp_path / "data_0.pt", tmp_path):
        with pytest.raises(RolloutError, match=r"data_0.pt: file: is a pickle.*JSONL"):
            read(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "step_1/rank_0.bin"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x93nothing of the kind")
    with pytest.raises(RolloutError, match=name):
        read(path)


def test_a_dataset_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    with pytest.raises(RolloutError, match="plain file name"):
        read(tmp_path)


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_nothing_to_read(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / content).touch()
    with pytest.raises(RolloutError, match="no file of a known kind"):
        read(tmp_path)
    with pytest.raises(RolloutError, match="missing"):
        read(tmp_path / "nowhere")


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_sampled_runs_count_within_each_run(generated: list[bool]) -> None:
    expected, count = [], 0
    for sampled in generated:
        count = count + 1 if sampled else 0
        expected.append(count)
    assert sampled_runs(torch.tensor(generated)).tolist() == expected
