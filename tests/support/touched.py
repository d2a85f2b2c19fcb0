"""Prints the test files that a change touches: changed ones, and those that import a changed module.

    python -m tests.support.touched [REVISION]     compares the working tree with REVISION, HEAD by default

Where no test imports a changed module, the tests of the modules that import it are taken instead, and so on. A file that is
not imported (a configuration, a script, a page) belongs to the tests that name it; where none does, all tests are printed.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

from tests.support.places import ROOT


@functools.cache
def imported(file: Path) -> set[str]:
    """Modules that a Python file imports, with every package above them left out."""
    names = set()
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@functools.cache
def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def module(file: Path) -> str:
    """The name under which a file is imported."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def touched(changed: set[Path], files: list[Path]) -> list[Path]:
    """Test files among `files` that a change of the files `changed` touches; paths are relative to the repository."""
    imports = {file: imported(ROOT / file) for file in files}
    is_test = lambda file: file.parts[0] == "tests" and file.name.startswith("test_")
    found, wave, seen = {file for file in changed if is_test(file)}, set(changed), set(changed)
    while wave:
        importers: set[Path] = set()
        for file in wave:
            mine = {other for other in files if file.suffix == ".py" and module(file) in imports[other]} - seen
            tests = {other for other in mine if is_test(other)}
            if not mine and not is_test(file):
                tests = {other for other in files if is_test(other) and file.name in text(ROOT / other)}
                if not tests and file in changed:
                    return [Path("tests")]
            found |= tests
            importers |= set() if tests else mine  # nobody tests it directly: look one floor up
        seen |= importers
        wave = importers
    return sorted(file for file in {*found, Path("tests/project/test_layering.py")} if (ROOT / file).is_file())


def main() -> None:
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {*git("diff", "--name-only", revision), *git("ls-files", "--others", "--exclude-standard")}
    files = [
        p.relative_to(ROOT)
        for top in ("icar_jax", "tests", "benchmarks", "experiments")
        for p in sorted((ROOT / top).rglob("*.py"))
    ]
    prose = (".md", ".png", ".json", ".txt", ".gitignore", "LICENSE")
    print(*touched({Path(name) for name in names if not name.endswith(prose) or name.startswith("icar_jax/")}, files))


if __name__ == "__main__":
    main()
