"""Build of the Cython extensions. Everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent
OPENMP = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
OPENMP_LINK = ["-lomp"] if sys.platform == "darwin" else ["-fopenmp"]


def extension(path: Path) -> Extension:
    """One extension module for one .pyx; only the CPU backend's stages use OpenMP."""
    uses_openmp = path.parent.name == "cpu"
    headers = (*path.parent.glob("*.h"), *ROOT.glob("ffmoe_core/**/*.pxd"))
    return Extension(
        ".".join(path.relative_to(ROOT).with_suffix("").parts),
        [str(path.relative_to(ROOT))],
        extra_compile_args=["-O3", "-g0"] + (OPENMP if uses_openmp else []),
        extra_link_args=OPENMP_LINK if uses_openmp else [],
        depends=["setup.py", *(str(p.relative_to(ROOT)) for p in headers)],
    )


# FFMOE_BUILD_ONLY="a.pyx b.pyx" rebuilds just those while developing.
only = {ROOT / name for name in os.environ.get("FFMOE_BUILD_ONLY", "").split()}
sources = [path for path in sorted((ROOT / "ffmoe_core").rglob("*.pyx")) if not only or path in only]

# Cython does not follow `from . cimport module`, so that a declaration that changed has to count for all.
declared = max(path.stat().st_mtime for path in ROOT.glob("ffmoe_core/**/*.pxd"))
generated = [path.with_suffix(".c") for path in sources]
outdated = any(path.exists() and path.stat().st_mtime < declared for path in generated)

setup(
    ext_modules=cythonize(
        [extension(path) for path in sources],
        force=outdated,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "binding": True,
            "embedsignature": False,
        },
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
