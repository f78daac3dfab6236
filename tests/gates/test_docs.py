"""The documents: what is generated is current, what is linked exists, what is shown runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
NOTES = ROOT / "benchmarks/NOTES.md"
TABLES = sorted(ROOT.glob("benchmarks/notes/*.md"))  # what is too long for it

pytestmark = pytest.mark.skipif(not NOTES.exists(), reason="runs in a checkout alone")


def relative(path):
    return str(path.relative_to(ROOT))


def run(*command):
    """A script of the checkout, without a GPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", ["docs/make_api.py", "benchmarks/where_it_stands.py"])
def test_what_is_generated_is_current(script):
    run(script, "--check")


def skip_without_transformers(code):
    if "import transformers" in code or "from transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(path):
    skip_without_transformers(path.read_text())
    assert run(path)


# ---- links ---------------------------------------------------------------------------------------


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(path):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), flags=re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_resolve(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_named_files_exist(path):
    """Paths in `code` that begin with one of our directories; an ellipsis or a pattern is none."""
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0].isalpha())
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", without_code(path.read_text()))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_named_tests_exist():
    """Those of the table of traps."""
    found = {
        name
        for path in (ROOT / "tests").glob("*/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests/README.md").read_text()))
    assert named and named <= found


# ---- README --------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name != "api.md" and python_blocks(p)], ids=relative
)
def test_python_code_runs(path):
    """The blocks of a document in order, in one namespace, on the CPU."""
    blocks = python_blocks(path)
    skip_without_transformers("\n".join(blocks))
    run("-W", "error::RuntimeWarning:flash_attn_sm120", "-c", "\n".join(blocks))


# ---- NOTES ---------------------------------------------------------------------------------------


def test_notes_have_stable_ids():
    """Every idea is a row of the index and a section, in the same order; every id that is cited is one."""
    text = "\n".join(path.read_text() for path in (NOTES, *TABLES))
    rows = re.findall(r"^\| \[([A-Z]\d\d)\]\(", text, flags=re.M)
    sections = re.findall(r"^#### ([A-Z]\d\d) ", text, flags=re.M)
    assert rows == sections and len(rows) == len(set(rows))
    cited = set(re.findall(r"\b([FBDSHT]\d\d)\b", text))
    assert cited <= set(sections)


@pytest.mark.parametrize("path", [NOTES, *TABLES], ids=relative)
def test_lines_of_notes_are_short(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 160] == []
