"""SavedOptimizer: what LowRankOptimizer saves, and what it takes from a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharded import is_sharded
from ..sharded import state as sharded_state
from ..storage.eight_bit import SCALES
from . import groups, keys, loading
from .buckets import members_of


class SavedOptimizer(Optimizer):
    """The part of LowRankOptimizer that reads and writes checkpoints. All of a checkpoint is checked before
    anything of it is taken.

    LowRankOptimizer has what this part uses: own_keys and fixed, _hyper and _layout, and what _forget drops.
    """

    def _ask_for_skips(self) -> None:
        for group in self.param_groups:
            if skipped := self._skips.ask(group):
                group["calls"] -= skipped

    def __getstate__(self) -> dict[str, Any]:
        self._ask_for_skips()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self.__dict__.setdefault("_clamp_warned", set())
        for key, value in self._missing_in_older({}).items():
            self.defaults.setdefault(key, value)
        loading.complete_older(self.param_groups, self.state, self._missing_in_older)

    def _missing_in_older(self, group: dict[str, Any]) -> dict[str, Any]:
        """Keys that a group saved by an older version may lack, with the values that they had in that
        version."""
        return groups.missing_in_older(group)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's. It holds only tensors and Python's own types, so that torch.load(...,
        weights_only=True) accepts it."""
        self._ask_for_skips()
        packed = super().state_dict()
        if any(groups.is_low_rank(group) and group["state_bits"] == 8 for group in self.param_groups):
            packed["state"] = {key: sharded_state.decoded(state) for key, state in packed["state"].items()}
        packed["state"] = {key: sharded_state.by_rows(state) for key, state in packed["state"].items()}
        return packed

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with two differences: fp32 states of half-precision parameters stay fp32, and the
        loaded states share no memory with `state_dict`.

        Raises ValueError where the checkpoint's groups or states cannot belong to this optimizer, and
        RuntimeError where `in_backward` has projected gradients with the bases that would be replaced.
        """
        if self._in_backward is not None:
            self._in_backward.refuse_pending("load_state_dict()")
        self._ask_for_skips()
        try:
            loading.load_uncast(self, super().load_state_dict, state_dict, check=self._checked, restore=self._restore)
        finally:
            self._forget()

    def _checked(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """The dict to load, completed by the keys that an older version did not save. Raises ValueError where
        it does not fit this optimizer."""
        loading.refuse_projectors(incoming)
        final = {**incoming, "param_groups": [dict(group) for group in incoming["param_groups"]]}
        final["state"] = {key: dict(state) for key, state in incoming["state"].items()}
        loading.complete_older(final["param_groups"], final["state"], self._missing_in_older)
        changes: list[str] = []
        for index, (group, saved) in enumerate(zip(self.param_groups, final["param_groups"], strict=False)):
            changes += self._check_loaded_group(group, saved, index)
            if len(group["params"]) == len(saved["params"]):  # else torch raises
                for place, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True)):
                    if state := final["state"].get(saved_id):
                        sharded_state.check_mesh(state, param, groups.describe(group, index, place))
                        if groups.is_low_rank(saved):
                            sharded_state.normalise_(state, is_sharded(param), saved["state_bits"] == 8)
                        self._check_loaded_state(state, param, saved, group, index, place)
        groups.warn_of_changes(changes)
        return final

    def _check_loaded_group(self, group: dict[str, Any], saved: dict[str, Any], index: int) -> list[str]:
        """One sentence for each setting that the checkpoint's group changes. Raises ValueError where that
        group does not fit this one."""
        if groups.is_low_rank(group) != groups.is_low_rank(saved):
            kinds = ("dense", "low-rank")
            raise ValueError(
                f"group {index} is {kinds[groups.is_low_rank(group)]} here but {kinds[groups.is_low_rank(saved)]} in the checkpoint; "
                "build the groups as they were when it was saved (a checkpoint of another optimizer does not fit)"
            )
        if missing := [key for key in keys.names(self.own_keys) if key not in saved]:
            raise ValueError(f"the checkpoint's group {index} has no {missing[0]!r}; it was saved for another optimizer")
        groups.check_names({**saved, "param_names": None}, index, keys.names((*groups.ALL_KEYS, *self.own_keys)))
        groups.check_values(saved, index, self.own_keys, self.fixed)
        if not groups.is_low_rank(group) or len(group["params"]) != len(saved["params"]):
            return []
        final = {**group, **saved, "params": group["params"]}
        for place in range(len(group["params"])):
            groups.check_param(final, index, place)
        return loading.changes(group, saved, (*keys.LOW_RANK, *self.own_keys), index)

    def _check_loaded_state(
        self, state: dict[str, Any], param: Tensor, saved: dict[str, Any], group: dict[str, Any], index: int, place: int
    ) -> None:
        where = groups.describe(group, index, place)
        if not groups.is_low_rank(saved):
            loading.check_dense(state, param, where)
            return
        shape = groups.matrix_shape(param)
        right = groups.is_right(param, saved["proj_type"])
        m, rank = shape[1 if right else 0], min(saved["rank"], *shape)
        batch = param.shape[:1] if param.dim() == 3 else ()
        layout = self._layout(self._hyper(saved), param, right, rank)
        if is_sharded(param):
            layout = {name: each for name, each in layout.items() if name not in SCALES}
            saved = {**saved, "state_bits": 32}  # its moments are decoded
        loading.check_low_rank(state, {"basis": (m, rank), **{name: each for name, (each, _) in layout.items()}}, batch, saved, where)

    def _restore(self, final: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, final["param_groups"], strict=True):
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
                saved = final["state"].get(saved_id, {})
                if groups.is_low_rank(group) and is_sharded(param) and saved:
                    hyper = self._hyper({**group, **saved_group, "params": group["params"]})
                    members = members_of(param, saved_group)
                    parts = members.state_parts(functools.partial(self._layout, hyper))
                    sharded_state.restore(self.state[param], saved, members.sharding, parts, param.device)
                elif groups.is_low_rank(group):
                    loading.restore_low_rank(self.state.get(param, {}), saved, param)
                else:
                    loading.restore_dense(self.state.get(param, {}), saved, param)
