"""Matrices of parameters of which `make test` runs a part and `make test-all` (`pytest --all`) everything.

A mark `slow` is all there is to it: a case without one is representative of those that have it. Each value of each parameter, and each pair
of values that a formula or a branch looks at together, keeps a case without a mark.
"""

import itertools

import pytest


def representative(cases, keep):
    """All of the cases, for pytest.mark.parametrize; those for which keep(*case) is false, or keep(case) where a case is one value, are
    slow."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if keep(*values) else pytest.mark.slow))
    assert any(not case.marks for case in found), "nothing would be left of it"
    return found


def pairwise(*axes):
    """All combinations of the axes' values. Of those that are not slow, each value of an axis meets each value of every other axis."""
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    columns = list(itertools.combinations(range(len(axes)), 2)) or [(0, 0)]

    def pairs_of(case):
        return {(a, b, case[a], case[b]) for a, b in columns}

    missing, kept = set().union(*map(pairs_of, combinations)), set()
    while missing:
        best = max(combinations, key=lambda case: len(missing & pairs_of(case)))
        missing -= pairs_of(best)
        kept.add(best)
    return [
        pytest.param(*(axis[i] for axis, i in zip(axes, case, strict=True)), marks=() if case in kept else pytest.mark.slow)
        for case in combinations
    ]
