"""A whole step on buckets of random matrices, by any module that has `prepare`, judged by the reference in fp64."""

from __future__ import annotations

import torch
from buckets import bits as bits_of
from buckets import matrices, orient, same_bits, states, stored, tf32_unit
from coded import assert_codes, coded_states
from tolerances import (
    BIAS_CORRECTION_ERROR,
    UNIT,
    assert_within,
    back_project_error,
    decoded_error,
    moments_error,
    normalised_error,
    project_error,
    rounded_between,
    store_unit,
)

from lowrank_kernels import eight_bit, reference
from lowrank_kernels.kernels import table
from lowrank_kernels.kernels.dots import INTERPRETED

STEP = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.2, "scale": 0.5, "step": 4}
NAMES = ("weights", "grads", "bases", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")


def bucket(count, m, n, r, right, dtype=torch.float32, coded=False, layout="rows", basis_layout="rows", scale=1.0):
    """The lists of a step by name. Columns of the bases have length 1; the step does not need more of them. scale: of the gradients."""
    moments = coded_states(count, r, n, scale) if coded else states(count, r, n, scale)
    bases = matrices(count, m, r, dtype, basis_layout, scale=m**-0.5)
    weights, grads = stored(count, m, n, right, dtype, layout), stored(count, m, n, right, dtype, layout, scale)
    return dict(zip(NAMES, (weights, grads, bases, *moments), strict=False))


def copy(lists):
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}


def same(lists, others):
    return all(
        torch.equal(a, b) if a.dtype == torch.uint8 else same_bits(bits_of([a]), bits_of([b]))
        for name in lists
        for a, b in zip(lists[name], others[name], strict=True)
    )


def prepare(path, lists, right, stochastic=False):
    rows = table.Rows(**dict(zip(lists, table.pointer_table(*lists.values()), strict=True)))
    first = (lists[name][0] for name in NAMES[:4])
    aligned = table.aligned(*(tensors for name, tensors in lists.items() if name != "steps"))
    return path.prepare(rows, *first, count=len(lists["weights"]), right=right, aligned=aligned, stochastic=stochastic)


def run(path, lists, right, *, found_inf=None, device_lr=None, rounding_seeds=None, **step):
    """A step; counts on the device are the list "steps"."""
    launch = prepare(path, lists, right, rounding_seeds is not None)
    launch(**{**STEP, **step}, found_inf=found_inf, device_lr=device_lr, rounding_seeds=rounding_seeds)


def check(path, lists, right, device_lr=None, rounding_seeds=None, **step):
    """Runs a step. The bounds of its parts chained: an error of R grows into one of N and that into one of W."""
    exact = {name: [tensor.double() for tensor in tensors] for name, tensors in lists.items()}
    coded = "exp_avg_scales" in lists
    if coded:
        decoded = [eight_bit.decode(*state, torch.float64) for state in zip(*(lists[name] for name in NAMES[3:]), strict=True)]
        exact["exp_avgs"], exact["exp_avg_sqs"] = (list(tensors) for tensors in zip(*decoded, strict=True))
    scalars = {**STEP, **step}
    counts = [int(count) + 1 for count in lists["steps"]] if "steps" in lists else [scalars["step"]] * len(lists["weights"])
    on_device = ({"step": None} if "steps" in lists else {}) | ({"lr": None} if device_lr is not None else {})
    run(path, lists, right, device_lr=device_lr, rounding_seeds=rounding_seeds, **(step | on_device))

    lr = scalars["lr"] if device_lr is None else float(device_lr)
    betas = {name: scalars[name] for name in ("beta1", "beta2")}
    update = {"lr": lr, "scale": scalars["scale"], "weight_decay": scalars["weight_decay"]}
    for index, t in enumerate(counts):
        w, g, p, m, v = (exact[name][index] for name in NAMES[:5])
        dtype, weight = lists["bases"][0].dtype, lists["weights"][index]
        tf32 = tf32_unit(dtype)
        adam = {**betas, "eps": scalars["eps"], "step": t}
        r = reference.project(p, g, right)
        of_states = decoded_error(m, v) if coded else (0.0, 0.0)
        errors = moments_error(m, v, r, **betas, projected_error=project_error(p, orient(g, right), tf32), state_errors=of_states)
        n = reference.update_moments_(m, v, r, **adam)
        correction = BIAS_CORRECTION_ERROR if "steps" in lists else UNIT[torch.float32]
        bound = back_project_error(
            orient(w, right).to(weight.dtype), p, n, **update, device_lr=device_lr is not None,
            store=0.0 if rounding_seeds is not None else store_unit(weight.dtype, INTERPRETED),
            operand_unit=(0.0 if dtype == torch.float32 else 2 * UNIT[dtype]) + tf32, basis_unit=tf32,
            normalised_error=normalised_error(m, v, errors, **adam, correction=correction),
        )  # fmt: skip
        expected = reference.updated_weight(w, p, n, **update, right=right)
        if coded:
            assert_codes(tuple(lists[name][index] for name in NAMES[3:]), m, v, errors)
        else:
            assert_within(lists["exp_avgs"][index], m, errors[0], "M")
            assert_within(lists["exp_avg_sqs"][index], v, errors[1], "V")
        if rounding_seeds is None:
            assert_within(orient(weight, right), orient(expected, right), bound, "W")
        else:
            least, greatest = rounded_between(expected, orient(bound, right), rounding_seeds[index : index + 1], t)
            assert ((least <= weight) & (weight <= greatest)).all()
