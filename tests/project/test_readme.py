"""README and guides: their Python runs on tiny models, their links, paths, commands and configuration fields exist."""

import contextlib
import functools
import io
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint, cli
from icar_jax.cli.program import config_file
from icar_jax.config import check_override
from icar_jax.data.sources.files import ImagePaths
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.budgets import counted_costs, pack_quantiles
from icar_jax.inference.files.embedding import embed_files
from icar_jax.models.variants import CLIP
from tests.support.places import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "retention" / "README.md"]
RECIPE = (ROOT / "docs" / "recipe.md", PAGES[-1])  # they write fields without `config.`
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
PROGRAMS = {"train", "evaluate"}  # their flags are absl's
PROGRAM_FLAGS = {
    "--workdir",
    "--coordinator",
    "--processes",
    "--process",
    "--start_timeout_s",
    "--profile",
    "--save-embeddings",
    "--debug",
}


def python_blocks(page) -> list[str]:
    return [code for _, language, code in FENCED.findall(page.read_text(encoding="utf-8")) if language == "python"]


def test_the_examples_run(clip_folder, complexity_folder, tmp_path, monkeypatch, capsys):
    """The first block of the README and that of docs/search.md, on a tiny bundle where the demo's would be."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(name)
    make_bundle(clip_folder, complexity_folder, "workdir/demo/bundle", thresholds=(0.3, 0.6))
    model = icar_jax.load("workdir/demo", batch_size=8)
    routing = model.description["routing"] | {"scores": pack_quantiles(rng.random(100))}
    checkpoint.amend("workdir/demo/bundle", {"routing": routing})
    embed_files(model, ImagePaths(["a.jpg", "b.png"]), "workdir/corpus")
    # A tower of tests costs little beside any complexity model, so no budget below 1 could be met.
    lowest = counted_costs(model.arch, model.scorer.complexity.arch).lowest_budget
    small = lambda block: block.replace("budget=0.7", "budget=1.0") if lowest > 0.7 else block

    load, _ = python_blocks(README)
    (corpus,) = python_blocks(ROOT / "docs" / "search.md")
    names: dict = {}
    exec(compile(small(load), "README.md", "exec"), names)
    assert names["image"].shape == names["cheap"].shape == (2, 24) and names["score"].shape == (2,)
    exec(compile(corpus, "search.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith((str(tmp_path / "a.jpg"), str(tmp_path / "b.png")))


@pytest.mark.check
def test_the_example_of_modules_runs():
    (example,) = [block for block in python_blocks(README) if "variants[" in block]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["embeds"].shape == names["same"].shape == (1, CLIP["vit_b32"].vision.embed_dim)
    assert np.abs(names["embeds"] - names["same"]).max() > 0, "the changed activation counts"


@pytest.mark.check
def test_the_guide_to_modules_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "docs" / "modules.md")
    names: dict = {}
    learnt = """
for _, variable in nnx.iter_graph(clip):
    if isinstance(variable, nnx.LoRAParam):
        variable[...] = jax.random.normal(jax.random.key(5), variable.shape)
adapted ="""
    for block in blocks:
        if "nnx.LoRA(" in block:
            assert block.count("adapted =") == 1
            plain = names["other"].encode_image(names["images"])
            block = block.replace("adapted =", learnt)
        exec(compile(block, "modules.md", "exec"), names)
    names["plain"] = plain
    far = lambda a, b: np.abs(names[a] - names[b]).max()
    assert list(names["out"].image) == [2, 4, 6] and len(names["hidden"]) == 7
    np.testing.assert_allclose(names["again"].encode_image(names["images"]), names["embeds"], atol=1e-5)
    assert far("changed", "embeds") > 1e-3 and far("mean_pooled", "early") > 1e-3 and far("plain", "adapted") > 1e-3
    assert far("adapted", "merged") < 1e-4
    assert names["saliency"].shape == names["images"].shape and "seen" in str(names["seen"])


def test_the_readme_is_short_and_maps_every_folder():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    packages = [folder for folder in (ROOT / "icar_jax").iterdir() if (folder / "__init__.py").is_file()]
    assert [folder.name for folder in packages if f" {folder.name}/" not in text] == []


def test_the_index_links_every_page():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {file.name for file in (ROOT / "docs").iterdir() if file.suffix in (".md", ".ipynb")} - {"index.md"}
    assert {name for name in pages if f"]({name})" not in text} == set()


@each_page
def test_links_resolve(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        assert (page.parent / target).exists(), f"{link} leads nowhere"
        assert target or anchor in anchors, f"{link} names no heading of this page"


@each_page
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "icar_jax|configs|tests|examples|experiments|benchmarks|docs"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./*-]*\w", text):
        assert list(ROOT.glob(path)), f"{path} does not exist"
    for module in re.findall(r"python -m ((?:experiments|tests|benchmarks)[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{module} does not exist"


@each_page
def test_commands_parse(page):
    text = page.read_text(encoding="utf-8")
    lines = [line for _, _, code in FENCED.findall(text) for line in code.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    for line in [*lines, *spans]:
        if re.match(r" *(icar|python3?) +[\w-]", line):
            require_command([part.rstrip(",;") for part in shlex.split(line, comments=True)])
    for flag in {flag.partition("=")[0] for span in spans for flag in span.split()[:1] if flag.startswith("--")}:
        assert flag.startswith("--config.") or flag in every_flag(), f"{flag} is a flag of no command"


@each_page
def test_fields_of_the_configuration_exist(page):
    text = page.read_text(encoding="utf-8")
    full = re.findall(r"(?<![\w.])config\.[a-z_]+(?:\.[a-z_0-9]+)+", text)
    short = re.findall(r"`((?:clip|complexity|data|optim|loss|train)\.[a-z_]+)[`=]", text) if page in RECIPE else []
    for field in {*full, *(f"config.{name}" for name in short)} - {"config.eval.distractors"}:  # a group
        check_override(field)


def require_command(words: list[str]) -> None:
    program, first, *rest = words
    if program == "icar" and first not in PROGRAMS:
        assert first in commands(), f"icar {first} is no command"
        known = flags_of(first) | {"--debug"}
    elif program == "icar" or first in {f"{name}.py" for name in PROGRAMS}:
        known = PROGRAM_FLAGS
        for word in rest:
            if word.startswith("--config=") and "PATH" not in word:
                config_file(str(ROOT / word.partition("=")[2]) if "/" in word else word.partition("=")[2])
    elif first == "-m" or first.startswith("benchmarks/"):
        file = rest[0].replace(".", "/") + ".py" if first == "-m" else first
        known = script_flags(file)
    else:
        return  # python -c, and examples, which take no flags but --help
    for flag in [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]:
        if flag.startswith("--config."):
            check_override(flag.lstrip("-"))
        else:
            assert flag in known or flag == "--config", f"{' '.join(words)}: {flag} is no flag of it"


def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    return out.getvalue()


@functools.cache
def commands() -> set[str]:
    return set(re.search(r"\{([\w,-]+)\}", help_of()).group(1).split(","))


@functools.cache
def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(command)))


@functools.cache
def script_flags(file: str) -> set[str]:
    return set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / file).read_text(encoding="utf-8")))


@functools.cache
def every_flag() -> set[str]:
    scripts = [file for folder in ("benchmarks", "experiments/retention") for file in (ROOT / folder).glob("*.py")]
    found = [script_flags(str(file.relative_to(ROOT))) for file in scripts]
    return PROGRAM_FLAGS.union(*found, *(flags_of(command) for command in commands() - PROGRAMS))
