"""Both devices under the same test bodies: the ``device`` fixture."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test's tensors live, by torch's name."""
    return request.param


@pytest.fixture
def poisoned():
    """New memory holds NaN (255 in bytes), so that nothing can depend on what was not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def compiled_afresh(tmp_path_factory):
    """torch.compile's cache on disk, which knows nothing of a change in ffmoe, is a new one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
