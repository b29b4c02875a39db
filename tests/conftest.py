"""Every backend under the same test bodies: the ``kind`` fixture. And how hypothesis searches."""

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

from ffmoe_core.cuda import tiles
from tests.cuda import compilation
from tests.cuda.compilation import Compilations
from tests.support import CupyKind, NumpyKind

COMPILATIONS = pytest.StashKey[Compilations]()

# The same examples every run; time limits would only make a busy machine fail.
settings.register_profile(
    "ffmoe",
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ffmoe")

# Threads that wait for each other sleep instead of spinning: on a busy machine that is ten times faster.
# Read by the OpenMP runtime when it is loaded, so set before anything of ours is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests choose checked mode and kernels themselves, whatever the environment says.
os.environ.pop("FFMOE_CHECK", None)
os.environ.pop("FFMOE_PORTABLE_KERNELS", None)
os.environ.pop("FFMOE_TILES", None)


@functools.cache
def missing_gpu() -> str:
    """Why nothing can run on a GPU here; empty where it can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        cupy.cuda.runtime.getDeviceCount()
        cupy.zeros(1).sum()
    except Exception as error:  # whatever a broken driver raises is the reason
        return f"no usable NVIDIA GPU ({error})"
    return ""


def pytest_collection_modifyitems(items):
    """What is compiled in the background comes last."""
    items.sort(key=lambda item: "compilations" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def compilations(request):
    return request.config.stash[COMPILATIONS]


def pytest_collection_finish(session):
    compilations = session.config.stash[COMPILATIONS] = Compilations()
    # a worker of xdist collects all tests, but runs some of them: it compiles when it comes to that
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    if compilation.load() is not None:
        for item in session.items:
            if "compilations" in getattr(item, "fixturenames", ()):
                compilations.start(item.callspec.params["architecture"])


def pytest_sessionfinish(session):
    if COMPILATIONS in session.config.stash:
        session.config.stash[COMPILATIONS].cancel()


def pytest_runtest_setup(item):
    """Tests marked gpu are skipped where there is none; FFMOE_REQUIRE_GPU=1 makes that a failure."""
    if item.get_closest_marker("gpu") is None or not missing_gpu():
        return
    if os.environ.get("FFMOE_REQUIRE_GPU") == "1":
        pytest.fail(f"FFMOE_REQUIRE_GPU=1 but {missing_gpu()}", pytrace=False)
    pytest.skip(missing_gpu())


@pytest.fixture(scope="session", autouse=True)
def _newest_kernels():
    """A GPU's newest kernels, however small a test's products are: others are chosen where those are to be tested."""
    with tiles.only(tiles.HOPPER):
        yield


@pytest.fixture(scope="session", params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def kind(request):
    """One kind of array, and with it one backend."""
    return NumpyKind() if request.param == "numpy" else CupyKind()


@pytest.fixture(scope="session")
def cupy_kind():
    """CuPy's arrays, for tests marked gpu."""
    return CupyKind()
