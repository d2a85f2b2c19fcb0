"""Imports point down only, and flax stays in models/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "icar_jax"

ALLOWED = {
    "config": set(),
    "pytree": set(),
    "tensorfile": set(),
    "checkpoint": {"config", "pytree", "tensorfile"},
    "workdir": {"config", "pytree"},
    "models": {"config", "pytree", "checkpoint"},
    "data": {"config", "pytree", "checkpoint"},
    "parallel": {"config", "pytree", "checkpoint"},
    "convert": {"config", "pytree", "tensorfile", "checkpoint", "models", "data"},
    "inference": {"config", "pytree", "checkpoint", "workdir", "models", "parallel", "data", "convert"},
    "training": {"config", "pytree", "checkpoint", "workdir", "models", "parallel", "data", "convert"},
    "evaluation": {"config", "pytree", "checkpoint", "workdir", "models", "data", "inference"},
    "search": {"extras", "config", "pytree", "checkpoint", "workdir", "models", "parallel", "data", "inference", "evaluation"},
    "cli": {
        "extras",
        "config", "pytree", "checkpoint", "workdir", "models", "data", "convert", "inference", "training", "evaluation",
        "search", "parallel",
    },
    "__init__": {"inference", "models", "data"},
    "extras": set(),
}  # fmt: skip


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "icar_jax" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in ALLOWED else None


def files():
    return sorted(PACKAGE.rglob("*.py"))


def test_every_file_belongs_to_a_known_layer():
    found = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files()}
    assert found <= set(ALLOWED)
    assert len(files()) > 20


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported_modules(file):
        layer = layer_of(module)
        assert layer is None or layer == own or layer in ALLOWED[own], f"{file} ({own}) imports {module}"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_flax_is_imported_in_models_only(file):
    if file.relative_to(PACKAGE).parts[0] != "models":
        assert not any(name.split(".")[0] == "flax" for name in imported_modules(file))


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_root_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) < 60
