"""What a drafter version says about itself: ``manifest.json``, beside its weights.

The manifest is written once, by the registry, and never changed. It pins the bytes of the other
files and, by a digest, its own content; it names the policy the drafter fits, and tells where the
drafter came from.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafttrain.config import explain
from drafttrain.errors import CheckpointError
from drafttrain.tensorfile import check_regular

SCHEMA_VERSION: Final = 1
FILE_NAME = "manifest.json"
_DIGEST = "digest"

# Far above any real config or manifest; a larger file is not read.
JSON_LIMIT = 16 << 20

Kind = Literal["eagle3", "mtp", "draft_model"]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
# Of what has tensors of its own, layers and experts; far above any model.
MOST_PARTS: Final = 4096
Parts = Annotated[int, Field(gt=0, le=MOST_PARTS)]


class Record(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetFingerprint(Record):
    """What a policy must have in common with the one a drafter was made for."""

    architecture: str
    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Parts

    @classmethod
    def from_folder(cls, folder: str | Path) -> TargetFingerprint:
        """Read ``config.json`` of a policy folder.

        Raises:
            CheckpointError: it is missing or unreadable, or lacks a key.
        """
        path = Path(folder) / "config.json"
        return cls.from_config(read_json(path), where=path)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], where: str | Path = "policy config"
    ) -> TargetFingerprint:
        """Take it from a Hugging Face configuration; of a multimodal one, the text part.

        Raises:
            CheckpointError: a key is missing or has a wrong value; blames `where`.
        """
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        names = config.get("architectures") or [config.get("model_type")]
        if not isinstance(names, list):
            raise CheckpointError(where, "architectures", "expected a list of names")
        sizes = ("hidden_size", "vocab_size", "num_hidden_layers")
        values = {key: text[key] for key in sizes if key in text}
        try:
            return cls.model_validate({"architecture": names[0], **values}, strict=True)
        except ValidationError as error:
            raise explain(error, where, CheckpointError) from error


class TensorSpec(Record):
    """One tensor of ``model.safetensors``."""

    dtype: str
    """As torch names it, without ``torch.``."""
    shape: list[int]


class Lineage(Record):
    """What a version was trained on."""

    policy_versions: list[int]
    rollouts: Count
    tokens: Count
    """Rollout tokens trained on, repeats included."""
    optimizer_steps: Count


class Acceptance(Record):
    """Acceptance measured on held-out rollouts before publishing."""

    acceptance_length: float
    accepted_per_position: list[float]
    k: Size
    """Number of draft tokens."""
    temperature: float
    draft_sample_method: Literal["greedy", "probabilistic"]
    interval: tuple[float, float]
    """Confidence interval of the acceptance length."""
    held_out_rollouts: Count


class Manifest(Record):
    """One drafter version."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    version: Size
    kind: Kind
    parent: int | None
    """Version this one was trained on from; None for a first one."""
    created_at: str
    """ISO 8601, UTC."""
    code: str
    """Version of drafttrain that published it."""
    target: TargetFingerprint
    layer_ids: list[int]
    """Aux layers of the policy it reads, ascending."""
    files: dict[str, str]
    """File name to SHA-256, for every other file of the version."""
    tensors: dict[str, TensorSpec]
    lineage: Lineage
    acceptance: Acceptance | None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a version folder.

        Raises:
            CheckpointError: missing, damaged, or of a newer schema.
        """
        path = folder / FILE_NAME
        document = read_json(path)
        check_schema(document, path)
        digest = document.pop(_DIGEST, None)
        try:
            manifest = cls.model_validate(document)
        except ValidationError as error:
            raise explain(error, path, CheckpointError) from error
        if digest != digest_of(document):
            raise CheckpointError(path, _DIGEST, "is not that of the content; it was changed")
        return manifest

    def to_json(self) -> str:
        """As the file has it: the fields, and :func:`digest_of` them."""
        document = self.model_dump(mode="json")
        return json.dumps({**document, _DIGEST: digest_of(document)}, indent=2) + "\n"


def digest_of(document: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of a manifest's fields, whatever their order and layout in the file."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def check_schema(document: dict[str, Any], path: Path) -> None:
    """Refuse what a newer drafttrain wrote.

    Raises:
        CheckpointError: the schema version is missing or not one this code reads.
    """
    found = document.get("schema_version")
    if type(found) is int and found > SCHEMA_VERSION:
        problem = f"{found} is newer than {SCHEMA_VERSION}, the newest known; update drafttrain"
        raise CheckpointError(path, "schema_version", problem)
    if type(found) is not int or found != SCHEMA_VERSION:
        raise CheckpointError(path, "schema_version", f"{found!r:.80}, expected {SCHEMA_VERSION}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of reasonable size.

    Raises:
        CheckpointError: missing, unreadable, too large, or not a JSON object.
    """
    if check_regular(path, CheckpointError) > JSON_LIMIT:
        raise CheckpointError(path, "file", f"larger than {JSON_LIMIT} bytes")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, "file", f"cannot be read: {error.strerror}") from error
    try:
        document: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "file", f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(path, "file", "expected a JSON object")
    return document
