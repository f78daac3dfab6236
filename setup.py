"""Builds flash_attn_sm120._C: plain C against Python's limited API, without CUDA or PyTorch."""

import os
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

LIMITED_API = "cp310"
FREE_THREADED = (
    "flash_attn_sm120 needs a Python with the GIL: free-threaded Python lacks the limited API that "
    "it is built against. Install it in python3.14, say, in place of python3.14t."
)
# Without warnings, which are for developers: the Makefile asks for them through FA_SM120_CFLAGS.
MSVC_FLAGS = ["/std:c11", "/O2"]
UNIX_FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden"]


def refuse_free_threading():
    """Before anything is compiled, in one line, which pip shows."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(FREE_THREADED)


def extra_flags():
    return os.environ.get("FA_SM120_CFLAGS", "").split()


def compile_flags(compiler_type):
    return [*(MSVC_FLAGS if compiler_type == "msvc" else UNIX_FLAGS), *extra_flags()]


class AbiWheel(bdist_wheel):
    """One wheel for every Python from 3.10 on."""

    def finalize_options(self):
        self.py_limited_api = LIMITED_API
        super().finalize_options()


class BuildWithFlags(build_ext):
    """Adds the flags in the words of the compiler in use."""

    def build_extensions(self):
        for extension in self.extensions:
            extension.extra_compile_args = compile_flags(self.compiler.compiler_type)
        super().build_extensions()


class BuildWithCubins(build_py):
    """Ships compiled kernels where FA_SM120_PREBUILD names architectures: "sm_120f,sm_90a"."""

    def run(self):
        super().run()
        architectures = os.environ.get("FA_SM120_PREBUILD", "")
        if architectures and not self.editable_mode:
            self.run_command("build_ext")
            self._prebuild(architectures.split(","))

    def _prebuild(self, architectures):
        import subprocess
        import sys

        target = Path(self.build_lib, "flash_attn_sm120", "prebuilt").resolve()
        path = os.pathsep.join([str(Path(self.build_lib).resolve()), *sys.path])
        subprocess.run(
            [sys.executable, "-m", "flash_attn_sm120", "prebuild", str(target), *architectures],
            check=True,
            cwd=self.build_lib,  # not here, where the package lies without its extension
            env={**os.environ, "PYTHONPATH": path},
        )


def extension():
    return Extension(
        "flash_attn_sm120._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.c")),
        depends=[str(path) for path in (*Path("csrc").rglob("*.h"), *Path("kernels").glob("*.h"))],
        define_macros=[("Py_LIMITED_API", "0x030A0000")],
        extra_link_args=extra_flags(),
        py_limited_api=True,
    )


if __name__ == "__main__":
    refuse_free_threading()
    setup(
        ext_modules=[extension()],
        cmdclass={
            "bdist_wheel": AbiWheel,
            "build_ext": BuildWithFlags,
            "build_py": BuildWithCubins,
        },
    )
