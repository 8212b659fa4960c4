"""The rows of JSONL, Parquet and Arrow files, each with the place it stands at.

Nothing here is unpickled: a file that is a pickle (``torch.save`` writes one too) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from drafttrain.errors import RolloutError

# Rows decoded at once from a columnar file; bounds memory on files of any size.
_BATCH_ROWS = 256

PICKLED = (".pt", ".pth", ".pkl", ".pickle")
TABLES = (".jsonl", ".parquet", ".arrow")


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | RolloutError]]:
    """Each row of a file with where it stands (``file:line``), or what is wrong with it.

    Args:
        path: ``.jsonl``, ``.parquet`` or ``.arrow``.

    Raises:
        RolloutError: the file as a whole cannot be read.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
        return
    batches = _parquet(path) if path.suffix == ".parquet" else _arrow(path)
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise RolloutError(path, "file", f"is not whole: {error}") from error


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder written by ``Dataset.save_to_disk``.

    Raises:
        RolloutError: ``state.json`` is damaged, or names a file outside the folder.
    """
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RolloutError(state, "_data_files", "expected a list of file names") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise RolloutError(state, "_data_files", f"{name!r:.60}; expected a plain file name")
    return [folder / name for name in names]


def refuse_pickle(path: Path) -> None:
    """Say what to do with a file that only unpickling could read.

    Raises:
        RolloutError: always.
    """
    problem = (
        "is a pickle, which can run code when it is loaded, so it is not read; save the token ids "
        "as JSONL where it was written (docs/offline.md, Pickles)"
    )
    raise RolloutError(path, "file", problem)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | RolloutError]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parsed(line, where)
    except OSError as error:
        raise RolloutError(path, "file", f"cannot be read: {error.strerror}") from error


def _parsed(line: bytes, where: str) -> dict[str, Any] | RolloutError:
    try:
        text = line.decode("utf-8-sig")
        row: Any = json.loads(text)
        if not isinstance(row, dict):
            return RolloutError(where, "line", f"{type(row).__name__}; expected a JSON object")
        # Only an escape can bring in what is no text.
        broken = [name for name in row if not _is_text(name, row[name])] if "\\u" in text else []
    except (ValueError, RecursionError) as error:
        return RolloutError(where, "line", f"is not JSON: {error}")
    if broken:
        name = ascii(broken[0])[1:-1]
        return RolloutError(where, name, "half of a surrogate pair; expected Unicode text")
    return row


def _is_text(*values: Any) -> bool:
    """Whether every string is text, at any depth: JSON can write halves of surrogate pairs too."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[pyarrow.RecordBatch]:
    yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)


def _arrow(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Both Arrow formats: the stream that `datasets` writes, and the file with a footer."""
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.size() >= 6 and source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)
