"""The layers of csrc, by its own includes: no circle, and no include that goes up."""

import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FILES = sorted(CSRC.glob("**/*.[ch]"))

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not FILES, reason="runs in a checkout alone"),
]

# From the bottom up; a name stands for a .c file and its header. A file may include what stands in
# its own layer, as long as that makes no circle.
LAYERS = (
    "arithmetic dlpack error hash import platform ../kernels/geometry ../kernels/params "
    "../kernels/philox",
    "device settings shape split tiles variant",
    "driver plan plan_backward plan_forward",
    "block_lists following kernel_table mods options overlap plan_cache tensor tile_rows",
    "parts problem scatter state",
    "append cpu/append cpu/backward cpu/block_map cpu/combine cpu/forward cpu/rows cpu/scatter cpu/scores "
    "cpu/sequence cpu_threads arguments device_check launch planning",
    "attention explain",
    "module",
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}


def name_of(path):
    """As the table has it."""
    if path.parent.name == "kernels":
        return f"../kernels/{path.stem}"
    return str(path.relative_to(CSRC).with_suffix(""))


def includes_of(path):
    """The project's headers that a file includes, as paths, and the others as <names>."""
    for quoted, angled in re.findall(
        r'^#include (?:"([^"]+)"|<([^>]+)>)', path.read_text(), flags=re.M
    ):
        yield (path.parent / quoted).resolve() if quoted else f"<{angled}>"


def edges():
    """name -> names that it includes."""
    included = {name_of(path): set() for path in FILES}
    for path in FILES:
        ours = {name_of(x) for x in includes_of(path) if isinstance(x, Path)}
        included[name_of(path)] |= ours - {name_of(path)}
    return included


def reached_by(path):
    """All that a file includes, directly or not."""
    found, pending = set(), [path]
    while pending:
        for x in includes_of(pending.pop()):
            if x not in found:
                found.add(x)
                pending += [x] if isinstance(x, Path) else []
    return found


def test_every_file_is_in_one_layer():
    listed = [name for names in LAYERS for name in names.split()]
    assert len(listed) == len(LAYER), "a name stands twice"
    assert {name for name in listed if not name.startswith("..")} == {*map(name_of, FILES)}


def test_no_include_goes_up():
    up = [
        f"{name} (layer {LAYER[name]}) includes {other} (layer {LAYER[other]})"
        for name, others in edges().items()
        for other in others
        if LAYER[other] > LAYER[name]
    ]
    assert up == []


def test_no_circle():
    """Of files with their headers."""
    graphlib.TopologicalSorter(edges()).prepare()  # raises CycleError, which names it


def is_pure(name):
    """Whether the comment at the head of a file, or of its header, says so."""
    files = [path for path in FILES if name_of(path) == name]
    heads = [re.match(r"/\*.*?\*/", path.read_text(), flags=re.S) for path in files]
    return any(head and "pure c" in head[0].lower() for head in heads)


PURE = [path for path in FILES if is_pure(name_of(path))]


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(CSRC)))
def test_pure_c_reaches_neither_python_nor_cuda(path):
    reached = reached_by(path)
    assert "<Python.h>" not in reached and CSRC / "driver.h" not in reached
    assert not re.search(r"\bPy[A-Z_]\w*\s*\(", path.read_text())


def test_plans_are_pure_c():
    assert {"device", "plan", "plan_backward", "plan_forward", "split"} <= {*map(name_of, PURE)}
