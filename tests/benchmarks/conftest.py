import pytest

from benchmarks import shapes


@pytest.fixture(scope="session", autouse=True)
def tiny_model():
    """A LLaMA small enough to be timed in a test, with both orientations: 21 matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.LLAMA, "tiny", (32, 48, 3))
        yield "tiny"
