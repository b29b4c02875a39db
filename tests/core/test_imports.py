"""What is imported when, and in which direction."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ffmoe_core

ROOT = Path(__file__).parents[2]
CORE = ROOT / "ffmoe_core"


def modules_after(code):
    """Names in sys.modules of a fresh interpreter that ran ``code``."""
    code = f"{code}\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_core_imports_no_framework():
    loaded = modules_after("import ffmoe_core")
    assert "ffmoe_core.moe" in loaded
    assert not {"cupy", "torch", "jax", "mpi4py", "cuda", "ml_dtypes", "ffmoe_torch"} & loaded


def test_help_tells_what_functions_take():
    """At runtime, where the sources of compiled modules are not at hand."""
    for name in ffmoe_core.__all__:
        value = getattr(ffmoe_core, name)
        assert value.__doc__, name
        assert "pyi" not in value.__doc__
        if inspect.isclass(value):
            methods = [m for key, m in vars(value).items() if callable(m) and not key.startswith("_")]
            assert all(method.__doc__ for method in methods), name
        elif inspect.signature(value).parameters:
            assert "Raises" in value.__doc__ or "See" in value.__doc__, name


def test_a_layer_of_numpy_arrays_imports_no_framework():
    loaded = modules_after(
        "import numpy as np\n"
        "from ffmoe_core import MoEConfig, moe_backward, moe_forward\n"
        "config = MoEConfig(d_model=4, ffn_dim=4, num_experts=2, top_k=1)\n"
        "x, gate = np.ones((3, 4), 'f'), np.ones((2, 4), 'f')\n"
        "up, down = np.ones((2, 4, 4), 'f'), np.ones((2, 4, 2), 'f')\n"
        "result = moe_forward(x, gate, up, down, config)\n"
        "moe_backward(x, result.saved, x, gate, up, down, config)\n"
    )
    assert "ffmoe_core.cpu.backend" in loaded
    assert not {"cupy", "torch", "cuda", "ffmoe_torch", "ffmoe_core.cuda.backend"} & loaded


IMPORT = re.compile(r"^\s*(?:from\s+([.\w]+)\s+c?import\s+([\w, (]+)|c?import\s+([\w.]+))")


def imports_of(path):
    """(absolute module name, line) of every import of ours or of a framework in a .py, .pyx or .pxd file."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = IMPORT.match(line)
        if not match:
            continue
        name = match[1] or match[3]
        dots = len(name) - len(name.lstrip("."))
        if dots:
            base = ".".join(package[: len(package) - dots + 1])
            rest = name[dots:] or match[2].split(",")[0].strip()
            name = f"{base}.{rest}"
        found.append((name, f"{path.relative_to(ROOT)}:{number}"))
    return found


# the files of the layer whose experts are spread over ranks, each of which may import those that follow it
SPREAD = ("expert_parallel", "ep_experts", "ep_exchange", "ep_types")


def sources():
    return [path for suffix in ("py", "pyx", "pxd") for path in sorted(CORE.rglob(f"*.{suffix}"))]


def test_the_files_are_found():
    names = {path.name for path in sources()}
    assert {"moe.pyx", "stages.pyx", "arrays.pxd", "backend.py", "config.py", "routing.pyx"} <= names
    found = {name for name, _ in imports_of(CORE / "moe.pyx")}
    assert {"ffmoe_core.backend", "ffmoe_core.arrays", "numpy"} <= found
    assert "ffmoe_core.checks" in {name for name, _ in imports_of(CORE / "ep_exchange.pyx")}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(CORE)))
def test_imports_run_one_way(path):
    """ffmoe_torch -> ffmoe_core -> moe, stages -> backend -> cpu | cuda -> arrays, config, errors.

    And expert_parallel -> ep_experts -> ep_exchange -> moe and ep_types -> comm, which knows no layer.
    """
    inside = path.relative_to(CORE)
    forbidden = ["torch", "ffmoe_torch", "tests"]
    if inside.parts[0] != "cuda" and str(inside) not in ("arrays.pyx", "comm/nccl.py"):
        forbidden.append("cupy")
    if str(inside) != "comm/mpi.py":
        forbidden.append("mpi4py")
    if inside.stem not in ("expert_parallel", "ep_types") and inside.parts[0] != "comm":
        forbidden.append("ffmoe_core.comm")
    if inside.parts[0] == "comm":
        forbidden += [f"ffmoe_core.{name}" for name in ("moe", "stages", "backend", "plan")]
    if str(inside) != "__init__.py":
        above = SPREAD[: SPREAD.index(inside.stem)] if inside.stem in SPREAD else SPREAD
        forbidden += [f"ffmoe_core.{name}" for name in above]
    if inside.stem == "ep_types":
        forbidden.append("ffmoe_core.moe")
    if inside.parts[0] == "cpu":
        forbidden.append("ffmoe_core.cuda")
    if inside.parts[0] == "cuda":
        forbidden.append("ffmoe_core.cpu")
    if inside.parts[0] in ("cpu", "cuda"):
        forbidden += ["ffmoe_core.moe", "ffmoe_core.stages", "ffmoe_core.backend", "ffmoe_core.checks"]
    elif inside.name not in ("backend.py", "__init__.py"):
        forbidden += ["ffmoe_core.cpu", "ffmoe_core.cuda"]
    if inside.stem in ("arrays", "config", "errors", "plan", "checks", "backend"):
        forbidden += ["ffmoe_core.moe", "ffmoe_core.stages"]
    if inside.stem in ("config", "errors", "plan"):
        forbidden += ["ffmoe_core.arrays", "ffmoe_core.checks", "ffmoe_core.backend", "numpy"]
    for name, place in imports_of(path):
        assert not any(name == bad or name.startswith(f"{bad}.") for bad in forbidden), (
            f"{place} imports {name}"
        )


def test_the_reference_imports_nothing_of_ours():
    tree = ast.parse((ROOT / "tests" / "reference.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names == {"decimal", "math", "types", "numpy"}
