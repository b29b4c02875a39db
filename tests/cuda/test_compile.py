"""Every variant of every kernel compiles for every architecture."""

import re
import subprocess
import sys

import pytest

from ffmoe_core.cuda.compile import kernel_directory
from tests.cuda.compilation import ARCHITECTURES, STAGES, load, modules


@pytest.fixture(scope="module")
def nvrtc():
    if load() is not None:
        return load()
    if sys.platform == "linux":
        pytest.fail("NVRTC is not installed; it comes with the extra: pip install -e '.[dev]'", pytrace=False)
    pytest.skip("NVIDIA has no NVRTC for this system")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles(nvrtc, compilations, architecture):
    errors = compilations.errors(architecture)
    assert not errors, "\n\n".join(errors)


def test_a_broken_kernel_is_seen(nvrtc):
    binary, error = nvrtc.compile("__global__ void broken() { undeclared(); }", ("-arch=sm_80",))
    assert not binary
    assert "undeclared" in error


def test_every_kernel_begins_by_waiting_for_the_one_before_it():
    """One that did not would run beside it, and so would all that come after."""
    kernels = 0
    for path in kernel_directory().glob("*.cu"):
        for _, after in re.findall(
            r"extern \"C\" __global__(.*?)\) {\n *(.*?)\n", path.read_text(), re.DOTALL
        ):
            waits = ("after_earlier_kernels();", "wait_for_earlier_kernels();")
            assert after in waits, path.name
            assert after == waits[0] or "let_later_kernels_come();" in path.read_text(), path.name
            kernels += 1
    assert kernels == sum(
        len(re.findall("__global__", path.read_text())) for path in kernel_directory().glob("*.cu")
    )


def test_every_source_has_variants():
    assert {file for file, _ in modules()} == {path.name for path in kernel_directory().glob("*.cu")}


def test_variants_need_no_cupy():
    """Listing them must work where CuPy is not installed."""
    names = ", ".join(stage.__name__ for stage in STAGES)
    code = (
        f"import sys; sys.modules['cupy'] = None\nimport {names}\nassert all(s.variants() for s in ({names}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
