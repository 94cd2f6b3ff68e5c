"""The declarations of group keys, and what is made from them."""

import inspect

import pytest

import lowrank_kernels as lrk
from lowrank_kernels.optim import keys


@pytest.mark.parametrize("declared", [keys.LOW_RANK, keys.ADAMW, keys.RSO, keys.POSITION])
def test_defaults_are_what_they_declare_to_be(declared):
    for key in declared:
        if key.default is not keys.REQUIRED:
            value = key.checked(key.default, "here")
            assert value == key.default and type(value) is type(key.default)


def test_constructors_have_the_declared_defaults():
    for optimizer, declared in ((lrk.LowRankAdamW, (*keys.ADAMW, keys.CAPTURABLE)), (lrk.RSOAdamW, (*keys.ADAMW, *keys.RSO))):
        parameters = inspect.signature(optimizer).parameters
        found = {name: parameter.default for name, parameter in parameters.items() if name not in ("params", "unsupported")}
        assert found == keys.defaults(declared)


@pytest.mark.parametrize("optimizer, declared", [(lrk.LowRankAdamW, keys.LOW_RANK), (lrk.RSOAdamW, keys.RSO)])
def test_every_key_is_described_where_the_optimizer_is(optimizer, declared):
    assert all(f"{key.name}" in optimizer.__doc__ for key in declared)
