"""Reads the optimizer states of galore-torch, and goes on from them.

galore-torch keeps a GaLoreProjector in each state, an object that torch.load(weights_only=True) refuses. It
is read here by that same restricted unpickler, which is told of one class more: a stand-in that holds the
projector's attributes and has no code.

    ortho_matrix      right: Pᵀ (r, columns);  left: P (rows, r)
    exp_avg(_sq)      right: the transpose of ours, (rows, r);  left: ours, (r, columns)
    exp_avg_sq_row, exp_avg_sq_col      of Adafactor, the means over the last and the last but one dimension
    state1, state2    of the 8-bit optimizer: codes of bitsandbytes, with a table (qmap1) and the largest
                      |value| of each block (absmax1)

Source: galore-torch 1.0 (Apache-2.0), adamw.py, adamw8bit.py, adafactor.py and galore_projector.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..optim import groups
from ..optim.optimizer import LowRankOptimizer
from ..storage import eight_bit

PROJECTOR = "galore_torch.galore_projector.GaLoreProjector"
TRAINER_FILE = "optimizer.pt"
SETTINGS = ("lr", "betas", "eps", "weight_decay", "rank", "update_proj_gap", "scale", "proj_type")
"""Keys of a group that mean the same here."""
BLOCKS = (256, 2048)
"""Elements in a block of bitsandbytes: of today's versions, and of those before 0.44."""


class Projector:
    """Stands in for galore_torch's GaLoreProjector: rank, update_proj_gap, scale, proj_type, ortho_matrix."""


def load_checkpoint(optimizer: LowRankOptimizer, path: str | Path) -> None:
    """Loads what galore-torch saved, and goes on from it: bases, moments, counts, and the next refresh.

        optimizer = lrk.GaLoreAdamW(groups, lr=1e-2)      # groups and parameters in the order of that run
        load_checkpoint(optimizer, "run/optimizer.pt")

    Until the next refresh the updates are those of galore-torch, to rounding, if ε is 0 and nothing decays:
    here ε stands outside of the bias correction, and decay comes before the update. At a refresh the basis is
    that of this optimizer.

    Args:
        optimizer: of this package. Its settings become those of the checkpoint, of which a warning tells.
        path: a file with an optimizer's state_dict(), or with a dict that has it as "optimizer", as
            galore-torch's own script saves it; or the folder of a checkpoint of Hugging Face's Trainer.

    States of 8 bits are decoded, and coded anew where the group has state_bits=8. Adafactor's M holds the
    learning rate there; it is divided by the group's. Its states of parameters that are not projected have no
    counterpart here; they start anew, of which a warning tells.

    The file is read by torch's restricted unpickler, and no code in it runs.

    Raises:
        ValueError: for a file that holds no optimizer, parameters and groups that do not fit, or
            correct_bias=False.
        pickle.UnpicklingError: for a file that wants to run code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TRAINER_FILE
    with reading():
        held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, dict) and "param_groups" not in held:
        held = held.get("optimizer", held)
    if not isinstance(held, dict) or not {"state", "param_groups"} <= held.keys():
        raise ValueError(f"{path} holds no state_dict of an optimizer")
    optimizer.load_state_dict(converted(optimizer, held))


def reading() -> Any:
    """A context in which torch.load(weights_only=True) takes projectors."""
    return torch.serialization.safe_globals([(Projector, PROJECTOR)])


def is_of_galore(state_dict: dict[str, Any]) -> bool:
    return any("projector" in state for state in state_dict["state"].values())


def converted(optimizer: LowRankOptimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of galore-torch as one that `optimizer.load_state_dict` takes."""
    own = optimizer.state_dict()["param_groups"]
    theirs = saved["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in theirs]:
        raise ValueError(
            f"the checkpoint's groups have {[len(group['params']) for group in theirs]} parameters and the optimizer's "
            f"{[len(group['params']) for group in own]}; build the groups as they were, in that order"
        )
    states: dict[Any, dict[str, Any]] = {}
    dropped = 0
    for index, (group, other, mine) in enumerate(zip(own, theirs, optimizer.param_groups, strict=True)):
        if other.get("correct_bias", True) is not True:
            raise ValueError(f"the checkpoint's group {index} has correct_bias=False, and this package corrects the bias")
        group |= {key: other[key] for key in SETTINGS if key in other and _fits(key, other[key])}
        for place, (key, param) in enumerate(zip(other["params"], mine["params"], strict=True)):
            state = saved["state"].get(key)
            if not state:
                continue
            where = groups.describe(mine, index, place)
            found = _low_rank(state, group, param, where) if groups.is_low_rank(group) else _dense(state, param)
            if found is None:
                dropped += 1
            else:
                states[group["params"][place]] = found
        if groups.is_low_rank(group):
            steps = [int(states[key]["step"]) for key in group["params"] if key in states]
            group["calls"] = max(steps, default=0)
            if len(set(steps)) > 1:
                warnings.warn(
                    f"parameters of the checkpoint's group {index} have made {min(steps)} to {max(steps)} steps, and refresh by their own "
                    f"count there; here all of a group refresh by one, which goes on from {max(steps)}",
                    UserWarning,
                    stacklevel=3,
                )
    if dropped:
        warnings.warn(
            f"{dropped} parameters that are not projected had Adafactor's factored moments, and AdamW moves them here; they start anew",
            UserWarning,
            stacklevel=3,
        )
    return {"state": states, "param_groups": own}


def _fits(key: str, value: Any) -> bool:
    """Adafactor has two eps, which are fixed here."""
    return not (key == "eps" and isinstance(value, (tuple, list)))


def _low_rank(state: dict[str, Any], group: dict[str, Any], param: Tensor, where: str) -> dict[str, Any]:
    projector = state.get("projector")
    basis = getattr(projector, "ortho_matrix", None)
    if not isinstance(basis, Tensor):
        raise ValueError(f"the checkpoint has no projector with one basis for {where}; proj_type='full' has no counterpart here")
    right, step = groups.is_right(param, group["proj_type"]), int(state["step"])
    found: dict[str, Any] = {
        "step": torch.tensor(float(step)),
        "basis": (basis.mT if right else basis).to(param.dtype),
        "refreshed_at": max(step - 1, 0) // group["update_proj_gap"] * group["update_proj_gap"],
    }
    rows, columns = groups.matrix_shape(param)
    shape = (rows, basis.shape[0]) if right else (basis.shape[1], columns)
    for name, value in _moments(state, shape).items():
        found[name] = (value.mT if right else value).contiguous()
    if "exp_avg_sq_row" in state:
        row, column = (state["exp_avg_sq_col"], state["exp_avg_sq_row"]) if right else (state["exp_avg_sq_row"], state["exp_avg_sq_col"])
        found |= {"row_var": row.float()[:, None], "col_var": column.float()[None]}
        if "exp_avg" in found:
            found["exp_avg"] /= float(group["lr"])
    if group["state_bits"] == 8:
        for name in eight_bit.MOMENTS:
            if name in found:
                found[name], found[f"{name}_scale"] = eight_bit.coded(name, found[name], step)
    return found


def _dense(state: dict[str, Any], param: Tensor) -> dict[str, Any] | None:
    if "exp_avg_sq_row" in state or "exp_avg_sq" not in state and "state1" not in state:
        return None
    return {"step": torch.tensor(float(state["step"])), **_moments(state, tuple(param.shape))}


def _moments(state: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """M and V in fp32, as many as there are."""
    found = {name: state[name].float() for name in eight_bit.MOMENTS if name in state}
    for name, number in zip(eight_bit.MOMENTS, "12", strict=True):
        if f"state{number}" in state:
            found[name] = _decoded(state, number).view(shape)
    return found


def _decoded(state: dict[str, Any], number: str) -> Tensor:
    """A moment of bitsandbytes' blockwise optimizers: qmap[code] · absmax of the block. Small ones are in
    fp32."""
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    largest, table = state[f"absmax{number}"].float(), state[f"qmap{number}"].float()
    block = next((block for block in BLOCKS if -(-codes.numel() // block) == largest.numel()), None)
    if block is None:
        raise ValueError(f"the checkpoint has {largest.numel()} blocks for {codes.numel()} codes; bitsandbytes makes blocks of 256 or 2048")
    return table[codes.flatten().long()] * largest.repeat_interleave(block)[: codes.numel()]
