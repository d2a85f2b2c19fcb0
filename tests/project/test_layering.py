"""Imports point down only, in no circle, and flax stays in models/."""

import ast
import functools
import tomllib
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "icar_jax"

EVERYWHERE = {"errors", "files", "version"}
LIBRARY = {"config", "pytree", "checkpoint", "models", "data", "parallel", "convert"}
ALLOWED = {
    "errors": set(),
    "files": set(),
    "config": set(),
    "extras": set(),
    "pytree": set(),
    "tensorfile": set(),
    "version": set(),
    "program_cache": {"version"},
    "checkpoint": {"config", "program_cache", "pytree", "tensorfile"},
    "workdir": {"config", "pytree"},
    "profiling": {"config", "workdir"},
    "models": {"config", "pytree"},
    "data": {"config", "pytree", "checkpoint"},
    "parallel": {"config", "pytree", "checkpoint"},
    "architectures": {"config", "checkpoint", "models"},
    "convert": LIBRARY | {"extras", "tensorfile"},
    "inference": LIBRARY | {"program_cache", "workdir", "profiling"},
    "training": LIBRARY | {"program_cache", "workdir", "profiling", "architectures"},
    "planner": LIBRARY | {"architectures", "training"},
    "evaluation": LIBRARY | {"workdir", "architectures", "inference"},
    "search": LIBRARY | {"extras", "program_cache", "workdir", "profiling", "inference", "evaluation"},
    "cli": LIBRARY
    | {"extras", "program_cache", "workdir", "profiling", "inference", "training", "planner", "evaluation", "search"},
    "__init__": {"inference", "models", "data"},
}
# Which folders of its own package a folder imports; files that lie beside folders may lie above or below them.
SUBLAYERS = {
    "convert/files": set(),
    "convert/hub": {"files", "layouts", "tokenizers"},
    "convert/layouts": {"files", "tokenizers"},
    "convert/parity": {"files", "layouts"},
    "convert/tokenizers": set(),
    "data/loader": {"sources"},
    "data/ratings": {"sources"},
    "data/scenes": set(),
    "data/sources": set(),
    "evaluation/complexity": {"metrics", "routing", "records", "report"},
    "evaluation/embeddings": {"metrics", "routing", "records", "report"},
    "evaluation/metrics": set(),
    "evaluation/records": {"metrics", "routing"},
    "evaluation/report": {"metrics", "routing", "records"},
    "evaluation/routing": {"metrics"},
    "inference/files": set(),
    "models/reduction": set(),
    "search/server": set(),
    "training/losses": set(),
    "training/tasks": {"losses"},
}


@functools.cache
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
        assert layer is None or layer == own or layer in ALLOWED[own] | EVERYWHERE, f"{file} ({own}) imports {module}"


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_flax_is_imported_in_models_only(file):
    if file.relative_to(PACKAGE).parts[0] != "models":
        assert not any(name.split(".")[0] == "flax" for name in imported_modules(file))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(file: Path) -> str:
    """A folder below a folder of the package is one room, a file beside such folders a room of its own."""
    parts = file.relative_to(PACKAGE).parts
    return "/".join(parts[:2])


def arrows(name_of) -> dict[str, set[str]]:
    """What each file or room imports of the package, itself left out."""
    by_module = {module_of(file): file for file in files()}
    found: dict[str, set[str]] = {}
    for file in files():
        names = imported_modules(file)
        # `from package import module` names the package too, which is not what is imported.
        used = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
        used = {name if name in by_module else name.rpartition(".")[0] for name in used}
        rooms = {name_of(by_module[name]) for name in used if name in by_module}
        found.setdefault(name_of(file), set()).update(rooms - {name_of(file)})
    return found


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Nodes along a circle; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := walk(after, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"] and not circle_in({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("name_of", [module_of, room_of])
def test_no_imports_in_a_circle(name_of):
    graph = arrows(name_of)
    assert sum(map(len, graph.values())) > 100
    assert circle_in(graph) == []


@pytest.mark.parametrize("folder", sorted(SUBLAYERS))
def test_folders_of_a_package_import_those_below(folder):
    package = folder.split("/")[0]
    found = {room for file in (PACKAGE / folder).glob("*.py") for room in arrows(room_of)[room_of(file)]}
    siblings = {room.split("/")[1] for room in found if room.startswith(package + "/") and not room.endswith(".py")}
    assert siblings <= SUBLAYERS[folder]


def test_every_folder_has_its_sublayer():
    found = {str(file.parent.relative_to(PACKAGE)) for file in files() if len(file.relative_to(PACKAGE).parts) > 2}
    assert found == set(SUBLAYERS)


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    assert listed == {module_of(file.parent / "__init__.py") for file in files()} | {"icar_jax.configs"}


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_root_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) < 60
