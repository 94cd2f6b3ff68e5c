"""A whole step on buckets of random matrices, by either path, judged by the reference in fp64."""

from __future__ import annotations

import dataclasses

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

from benchmarks import formulas
from lowrank_kernels.backends import reference
from lowrank_kernels.backends.triton import choose, configs, single_pass, table
from lowrank_kernels.backends.triton.dots import INTERPRETED
from lowrank_kernels.storage import eight_bit

STEP = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.2, "scale": 0.5, "step": 4}
NAMES = ("weights", "grads", "bases", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
chosen_row = choose.single_pass
NARROW = tuple(configs.SinglePassConfig(rank, 1, 64, 16, 16, warps, 1, W_STAGES=1) for rank, warps in ((32, 8), (64, 8), (128, 16)))
"""Rows that compile fast for shapes without 16-byte accesses, which the single pass serves in tests alone."""


def a_row_for_everything(arch, kind, rank, wide, eight_bit):
    """On a GPU, too, shapes that allow no 16-byte access, and fp32 products, run the single pass."""
    row = chosen_row(arch, kind, rank, wide, eight_bit)
    return row or next((row for row in NARROW if row.rank_covered >= rank), None)


def serve_everything(monkeypatch):
    monkeypatch.setattr(choose, "single_pass", a_row_for_everything)


def bucket(count, m, n, r, right, dtype=torch.float32, coded=False, layout="rows", basis_layout="rows", scale=1.0, pad=3):
    """The lists of a step by name, each matrix in a frame of `pad`. scale: of the gradients.

    Columns of the bases have length 1; the step does not need more of them.
    """
    moments = coded_states(count, r, n, scale) if coded else states(count, r, n, scale)
    bases = matrices(count, m, r, dtype, basis_layout, scale=m**-0.5, pad=pad)
    weights, grads = (stored(count, m, n, right, dtype, layout, of, pad) for of in (1.0, scale))
    return dict(zip(NAMES, (weights, grads, bases, *moments), strict=False))


def copy(lists):
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}


def same(lists, others):
    return all(
        torch.equal(a, b) if a.dtype == torch.uint8 else same_bits(bits_of([a]), bits_of([b]))
        for name in lists
        for a, b in zip(lists[name], others[name], strict=True)
    )


def bucket_of(lists, right, *, found_inf=None, device_lr=None, rounding_seeds=None, **step):
    """A bucket and its values. Counts are the list "steps", or those before update number `step`. R is the
    list "projected", or comes from the gradients."""
    lists, options = dict(lists), {**STEP, **step} | dict(found_inf=found_inf, device_lr=device_lr, rounding_seeds=rounding_seeds)
    counts, projected = lists.pop("steps", None), lists.pop("projected", None)
    lists.setdefault("grads", lists["weights"])
    positional = [lists.pop(name) for name in NAMES[:5]]
    made, hyper = formulas.bucket_of(*positional, **lists, **options, right=right, device_steps=counts)
    if projected is not None:
        made = dataclasses.replace(made, grads=None, projected=projected)
        made.check(hyper)
    return made, hyper


def run(path, lists, right, **options):
    """A step by single_pass or split; see bucket_of."""
    made, hyper = bucket_of(lists, right, **options)
    rows = table.rows_of(made)
    if path is single_pass:
        row = single_pass.row_for(made, rows.aligned)
        assert row is not None, "no row of the single pass serves this bucket"
        single_pass.step(made, hyper, rows, row)
    else:
        path.step(made, hyper, rows)


def check(path, lists, right, device_lr=None, rounding_seeds=None, **step):
    """Runs a step and judges it."""
    before = copy(lists)
    scalars = {**STEP, **step} | ({"lr": float(device_lr)} if device_lr is not None else {})
    run(path, lists, right, device_lr=device_lr, rounding_seeds=rounding_seeds, **step)
    for index in range(len(lists["weights"])):
        if "steps" in lists:
            scalars["step"] = int(lists["steps"][index]) + 1
        seed = None if rounding_seeds is None else rounding_seeds[index : index + 1]
        judge(before, lists, index, right, scalars, seed=seed, lr_on_device=device_lr is not None)


def judge(before, after, index, right, scalars, *, seed=None, lr_on_device=False, on_cpu_path=False, native=False):
    """One matrix after a step against the reference on what it was before, within the bounds of the step's
    parts chained: an error of R grows into one of N and that into one of W.

    seed: (1,) int64 where W is rounded stochastically. on_cpu_path: of backends/cpu.py, which rounds nothing
    but what it stores, and where the CPU is `native` in bf16 also R and N of such bases.
    """
    w, p = (before[name][index].double() for name in ("weights", "bases"))
    of_weight, of_basis = (before[name][index].dtype for name in ("weights", "bases"))
    coded, of_states = "exp_avg_scales" in before, (0.0, 0.0)
    if coded:
        m, v = eight_bit.decode(*(before[name][index] for name in NAMES[3:]), torch.float64)
        of_states = decoded_error(m, v)
    else:
        m, v = (before[name][index].double() for name in NAMES[3:5])
    adam = {name: scalars[name] for name in ("beta1", "beta2", "eps", "step")}
    update = {name: scalars[name] for name in ("lr", "scale", "weight_decay")}
    tf32 = 0.0 if on_cpu_path else tf32_unit(of_basis)
    if "projected" in before:
        r = before["projected"][index].double()
        of_r = torch.zeros_like(r)
    else:
        grad = before["grads"][index]
        r = reference.project(p, grad.double(), right)
        of_r = project_error(p, orient(grad.double(), right), tf32)
        if on_cpu_path and native and grad.dtype == of_basis == torch.bfloat16:
            of_r = of_r + UNIT[torch.bfloat16] * r.abs()
    if on_cpu_path:
        operand_unit = UNIT[torch.bfloat16] if native and of_weight == of_basis == torch.bfloat16 and seed is None else 0.0
    else:
        operand_unit = (0.0 if of_basis == torch.float32 else 2 * UNIT[of_basis]) + tf32
    errors = moments_error(m, v, r, scalars["beta1"], scalars["beta2"], projected_error=of_r, state_errors=of_states)
    n = formulas.update_moments_(m, v, r, **adam)
    of_n = normalised_error(m, v, errors, **adam, correction=BIAS_CORRECTION_ERROR)
    bound = back_project_error(
        orient(w, right).to(of_weight), p, n, **update, device_lr=lr_on_device,
        store=0.0 if seed is not None else store_unit(of_weight, INTERPRETED and not on_cpu_path),
        operand_unit=operand_unit, basis_unit=tf32, normalised_error=of_n,
    )  # fmt: skip
    expected = formulas.updated_weight(w, p, n, **update, right=right)
    weight = after["weights"][index]
    if coded:
        assert_codes(tuple(after[name][index] for name in NAMES[3:]), m, v, errors, scalars["step"])
    else:
        assert_within(after["exp_avgs"][index], m, errors[0], "M")
        assert_within(after["exp_avg_sqs"][index], v, errors[1], "V")
    if seed is None:
        assert_within(orient(weight, right), orient(expected, right), bound, "W")
    else:
        least, greatest = rounded_between(expected, orient(bound, right), seed, scalars["step"])
        assert ((least <= weight) & (weight <= greatest)).all(), "W is not the stochastic rounding of anything within its bounds"
