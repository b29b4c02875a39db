"""Both backends have the same stages under the same names and signatures."""

import importlib
import inspect

import pytest

from ffmoe_core.arrays import as_array
from ffmoe_core.backend import STAGES, Backend, backend_for

FOLDERS = ("cpu", "cuda")


def backend(folder):
    """The backend class of a folder; importing it needs no GPU."""
    module = importlib.import_module(f"ffmoe_core.{folder}.backend")
    return {"cpu": "CpuBackend", "cuda": "CudaBackend"}[folder], module


@pytest.fixture(scope="module")
def backends():
    loaded = {}
    for folder in FOLDERS:
        name, module = backend(folder)
        loaded[folder] = getattr(module, name)
    return loaded


def test_stages_are_those_of_the_protocol():
    assert set(STAGES) == {
        "gate_logits",
        "route",
        "route_and_sort",
        "router_losses",
        "route_backward",
        "gate_backward",
        "sort",
        "permute",
        "combine",
        "fill",
        "dispatch_ranks",
        "dispatch_slots",
        "grouped_gemm",
        "grouped_gemm_wgrad",
        "grouped_glu",
        "grouped_glu_backward",
    }
    assert set(Backend.__annotations__) == {*STAGES, "name"}


def test_both_have_all_stages_and_no_other_public_name(backends):
    for folder, cls in backends.items():
        public = {name for name in vars(cls) if not name.startswith("_")}
        assert public == {*STAGES, "name"}, folder
        assert cls.name == folder


@pytest.mark.parametrize("stage", STAGES)
def test_signatures_are_equal(backends, stage):
    ours, theirs = (inspect.signature(getattr(backends[folder], stage)) for folder in FOLDERS)
    assert next(iter(ours.parameters)) == "space"
    assert list(ours.parameters) == list(theirs.parameters)
    assert ours == theirs


@pytest.mark.parametrize("stage", STAGES)
def test_stages_stand_in_files_of_the_same_name(backends, stage):
    ours, theirs = (getattr(backends[folder], stage).__module__ for folder in FOLDERS)
    assert ours.replace(".cpu.", ".cuda.") == theirs


def test_the_array_decides(kind, backends):
    _, space = as_array(kind.full((1,), 0, "float32"))
    assert backend_for(space) is backends["cpu" if kind.name == "numpy" else "cuda"]
