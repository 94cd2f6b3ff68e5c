"""Matrices of parameters of which `make test` runs a part and `make test-all` (`pytest --all`) everything.

A mark `slow` is all there is to it: a case without one is representative of those that have it. Each value of
each parameter, and each pair of values that a formula or a branch looks at together, keeps a case without a
mark.
"""

import itertools

import pytest


def representative(cases, keep):
    """All of the cases, for pytest.mark.parametrize; those for which keep(*case) is false, or keep(case)
    where a case is one value, are slow."""
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if keep(*values) else pytest.mark.slow))
    assert any(not case.marks for case in found), "nothing would be left of it"
    return found


def pairwise(*axes):
    """All combinations of the axes' values. Of those that are not slow, each value of an axis meets each
    value of every other axis."""
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


def mark_repetitions(items, parameter, values):
    """Where every test runs for each of a parameter's values, whatever else it is about, mark most of that
    slow: of the values that are possible here, each combination of a test's other parameters keeps one, and
    each value of each other parameter keeps all."""
    tests = {}
    for item in items:
        call = getattr(item, "callspec", None)
        if call and parameter in call.params:
            others = frozenset((name, repr(value)) for name, value in call.params.items() if name != parameter) or frozenset({()})
            tests.setdefault(item.nodeid.partition("[")[0], {}).setdefault(others, {})[call.params[parameter]] = item
    for cases in tests.values():
        missing = {(value, other) for others in cases for other in others for value in values}
        kept = set()
        used = dict.fromkeys(values, 0)

        def keep(value, others, kept=kept, used=used, missing=missing):
            kept.add((value, others))
            used[value] += 1
            missing -= {(value, other) for other in others}

        for others in cases:
            keep(max(values, key=lambda value: (len({(value, other) for other in others} & missing), -used[value])), others)
        for others in cases:
            for value in values:
                if any((value, other) in missing for other in others):
                    keep(value, others)
        for others, case in cases.items():
            for value, item in case.items():
                if (value, others) not in kept:
                    item.add_marker(pytest.mark.slow)
