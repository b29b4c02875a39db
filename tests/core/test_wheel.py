"""The wheel, built from the source archive, works in a clean environment without any framework."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

PROGRAM = """
import importlib.util, json, sys
import numpy as np
import ffmoe_core
from ffmoe_core import MoEConfig, moe_backward, moe_forward

config = MoEConfig(d_model=8, ffn_dim=12, num_experts=4, top_k=2)
rng = np.random.default_rng(0)
arrays = [rng.standard_normal(shape).astype("f") for shape in ((5, 8), (4, 8), (4, 12, 8), (4, 8, 6))]
result = moe_forward(*arrays, config)
grads = moe_backward(arrays[0], result.saved, *arrays, config)
print(json.dumps({
    "file": ffmoe_core.__file__,
    "output": float(np.square(result.output).sum()),
    "gradients": [float(np.square(g).sum()) for g in grads if g is not None],
    "frameworks": [name for name in ("torch", "cupy", "ml_dtypes") if importlib.util.find_spec(name)],
}))
"""


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made from the source archive of a copy of this tree without anything built."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.pyd", "*.c"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    (found,) = (folder / "dist").glob("ffmoe-*.whl")
    return found


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """The interpreter of an environment with this wheel, NumPy and SciPy, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # what the wheel depends on is borrowed from here, so that nothing is downloaded
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for name in ("numpy", "scipy"):
        package = Path(importlib.util.find_spec(name).origin).parent
        for part in (package, package.with_name(f"{name}.libs")):
            if part.exists():
                (borrowed / part.name).symlink_to(part)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def test_a_layer_runs_from_an_empty_folder(clean_python, tmp_path):
    output = json.loads(run(clean_python, "-I", "-c", PROGRAM, cwd=tmp_path))
    assert Path(output["file"]).is_relative_to(clean_python.parents[1])
    assert output["frameworks"] == []
    here = json.loads(run(sys.executable, "-c", PROGRAM, cwd=ROOT))
    assert output["output"] == here["output"] > 0
    assert output["gradients"] == here["gradients"]
    assert len(output["gradients"]) == 4


def test_the_wheel_holds_kernels_types_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {
        f"ffmoe_core/kernels/{path.relative_to(ROOT / 'kernels').as_posix()}"
        for suffix in ("cu", "cuh")
        for path in (ROOT / "kernels").rglob(f"*.{suffix}")
    }
    assert "ffmoe_core/kernels/routing.cu" in kernels
    assert any(name.startswith("ffmoe_core/kernels/common/") for name in kernels)
    assert kernels <= names
    others = (
        "ffmoe_core/moe.pyi",
        "ffmoe_core/py.typed",
        "ffmoe_core/cuda/tiles.json",
        "ffmoe_torch/__init__.py",
    )
    assert names.issuperset(others)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") or name.endswith(".c") for name in names)


def test_the_installed_kernels_are_found(clean_python, tmp_path):
    """Where the package looks for its kernels once installed is where the wheel put them."""
    program = (
        "from pathlib import Path; import ffmoe_core;"
        "print(*sorted(p.name for p in (Path(ffmoe_core.__file__).parent / 'kernels').glob('*.cu')))"
    )
    found = run(clean_python, "-I", "-c", program, cwd=tmp_path).split()
    assert found == sorted(path.name for path in (ROOT / "kernels").glob("*.cu"))
