"""Who may import whom, read from every import in the package, those inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "drafttrain"
FOUNDATION = {"errors", "config", "tensorfile", "outputs"}
DATA = FOUNDATION | {"checkpoints", "rollouts"}
LEARNING = DATA | {"drafters"}
LOOPS = LEARNING | {"training", "control", "telemetry"}
TORCH = {"torch", "safetensors", "numpy", "pydantic"}
PLUGIN = {"vllm", "fastapi", "starlette", "uvicorn"}

# room: (rooms of ours it may import besides itself, other people's packages it may import)
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "config": ({"errors"}, {"pydantic", "yaml"}),
    "tensorfile": ({"errors"}, {"torch", "safetensors"}),
    "outputs": ({"errors"}, {"safetensors"}),
    "checkpoints": (FOUNDATION, TORCH),
    "rollouts": (FOUNDATION, TORCH | {"pyarrow", "msgpack", "jinja2"}),
    "drafters": (DATA, TORCH | {"transformers", "huggingface_hub", "peft"}),
    "training": (LEARNING, TORCH | {"transformers", "accelerate"}),
    "control": (LEARNING, TORCH | {"scipy"}),
    "simulator": (
        LEARNING | {"control"},
        {"numpy", "scipy", "pydantic", "yaml", "rich", "matplotlib"},
    ),
    "telemetry": (FOUNDATION, set()),
    "serving": ({"errors"}, set()),
    "publishing": (LOOPS, TORCH),
    "opening": (LOOPS, TORCH),
    "evaluation": (LOOPS | {"opening"}, TORCH | {"rich"}),
    "pretrain": (LOOPS | {"publishing", "opening"}, TORCH | {"matplotlib", "rich"}),
    "sidecar": (LOOPS | {"publishing", "serving"}, TORCH | {"watchfiles"}),
    "integrations": (DATA, TORCH | PLUGIN | {"httpx"}),
}
UNBOUND = {"cli", "demo", "__main__", "__init__"}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    """Every absolute module name `file` imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_import_is_allowed(file: Path) -> None:
    room = room_of(file)
    if room in UNBOUND:
        return
    assert room in TABLE, f"{room} has no row in the table of rooms"
    ours, theirs = TABLE[room]
    for name in imports_of(file):
        top, *rest = name.split(".")
        if top == "drafttrain":
            other = rest[0]
            assert other == room or other in ours | {"__version__"}, f"{room} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in theirs, f"{room} imports {name}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "drafters").glob("*.py")), ids=lambda f: f.name)
def test_drafters_do_not_import_a_sibling(file: Path) -> None:
    kinds = {"eagle3", "mtp", "draft_model"}
    if file.name == "__init__.py":
        return
    for name in imports_of(file):
        if name.startswith("drafttrain.drafters."):
            assert name.split(".")[2] not in kinds, f"{file.name} imports {name}"


def loaded_by(code: str) -> set[str]:
    """Modules in a bare process after running `code`."""
    command = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_the_plugin_loads_no_trainer() -> None:
    modules = loaded_by("from drafttrain.integrations.vllm.plugin import register; register()")
    assert "drafttrain.integrations.vllm.plugin" in modules
    heavy = {"training", "drafters", "control", "sidecar", "pretrain", "demo"}
    assert not {
        name for name in modules if name.startswith(tuple(f"drafttrain.{h}" for h in heavy))
    }


def test_the_simulator_answers_without_torch() -> None:
    modules = loaded_by("import drafttrain.simulator.study, drafttrain.simulator.report")
    assert "drafttrain.control.economics" in modules
    assert not modules & {"torch", "transformers", "vllm", "matplotlib"}


def test_help_imports_nothing_heavy() -> None:
    modules = loaded_by("from drafttrain.cli import _parser; _parser().format_help()")
    assert not modules & {"torch", "transformers", "vllm", "pydantic", "rich", "matplotlib"}
