"""Builds what a repository of Hugging Face's `kernels` holds, from wheels.

    make hub                                            # for this machine
    python hub/build.py dist/*.whl --output build/hub   # for the platforms of all wheels

A build variant holds the package of a wheel, its imports made relative: it can be loaded under any
name, also beside the package itself. The module is built against Python's limited API and links
neither PyTorch nor CUDA, so that one serves all variants of a platform. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "flash_attn_sm120"
# Transformers prepares masks for static caches only where it finds "flash" in a name.
NAME = "flash-sm120"
VERSION = 1  # of what a user of the kernel sees

TORCH = "torch-stable-abi24"  # from PyTorch 2.4 on; no ABI of it is used
# A variant serves its CUDA and what follows until the next major one. Kernels are compiled where
# they run, for what is there: hence PTX, which means "and all that is newer".
BACKENDS: dict[str, dict[str, object]] = {
    "cpu": {"type": "cpu"},
    "cu128": {"type": "cuda", "archs": ["8.0+PTX"]},
    "cu130": {"type": "cuda", "archs": ["8.0+PTX"]},
}
# What is run from a shell, and what type checkers read.
LEFT_OUT = re.compile(r"(__main__\.py|commands/.*|tune/.*|py\.typed|.*\.pyi|.*\.pyc)")


def build(wheels: list[Path], output: Path) -> None:
    """Writes the repository anew."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    shutil.copy(HERE / "CARD.md", output / "README.md")
    shutil.copy(HERE.parent / "LICENSE", output)
    for wheel in wheels:
        files = {"__init__.py": (HERE / "entry.py").read_bytes(), **package_of(wheel)}
        for backend, description in BACKENDS.items():
            variant = output / "build" / f"{TORCH}-{backend}-{platform_of(wheel)}"
            metadata = json.dumps(metadata_of(description, files), indent=2).encode() + b"\n"
            for name, content in {**files, "metadata.json": metadata}.items():
                (variant / name).parent.mkdir(parents=True, exist_ok=True)
                (variant / name).write_bytes(content)


def platform_of(wheel: Path) -> str:
    """ "x86_64-linux" of a wheel's name."""
    for pattern, system in (("linux.*_(x86_64|aarch64)", "linux"), ("win_(amd64)", "windows")):
        if found := re.search(pattern, wheel.name):
            return f"{found[1].replace('amd64', 'x86_64')}-{system}"
    raise ValueError(f"{wheel.name} is of no platform that kernels are built for")


def package_of(wheel: Path) -> dict[str, bytes]:
    """Path -> content of the package in a wheel, as it is in a variant."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            package, _, inner = name.partition("/")
            if package != PACKAGE or not inner or LEFT_OUT.fullmatch(inner):
                continue
            content = archive.read(name)
            if inner.endswith(".py"):
                content = made_relative(inner, content.decode()).encode()
            files[name] = content
    if not any(name.startswith(f"{PACKAGE}/_C.") for name in files):
        raise ValueError(f"{wheel.name} has no extension module")
    return files


def made_relative(name: str, text: str) -> str:
    """The source of a module of the package, without the package's name in its imports."""
    here = "." * (1 + name.count("/"))
    text = re.sub(rf"^( *)from {PACKAGE}\b\.?", rf"\1from {here}", text, flags=re.M)
    if found := re.search(rf"^ *import {PACKAGE}\b|import_module\(.{PACKAGE}", text, flags=re.M):
        raise ValueError(f"{name} imports the package by its name: {found[0].strip()}")
    return text


def metadata_of(backend: dict[str, object], files: dict[str, bytes]) -> dict[str, object]:
    """The metadata of a variant; the id is the name that the module is loaded under."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return {
        "id": f"_{NAME.replace('-', '_')}_{backend['type']}_{digest.hexdigest()[:8]}",
        "name": NAME,
        "version": VERSION,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": backend,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        build(arguments.wheels, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"hub/build.py: {error}")
    for variant in sorted((arguments.output / "build").iterdir()):
        print(variant)


if __name__ == "__main__":
    main()
