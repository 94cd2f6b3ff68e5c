"""galore-torch's names, arguments and defaults, for scripts and frameworks that import it.

    from lowrank_kernels.integrations import galore_torch

    galore_torch.install()                  # `import galore_torch` now gives this module's classes
    trainer = Trainer(…, TrainingArguments(optim="galore_adamw", optim_target_modules="all-linear", …))

`apollo_torch`, which Trainer imports for optim="apollo_adamw", is installed as well.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from .. import optim
from . import galore_checkpoint, layerwise
from .galore_checkpoint import load_checkpoint

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "install", "load_checkpoint", "uninstall"]
_replaced: dict[str, types.ModuleType | None] = {}
"""The modules that `install` has put others in place of; None where there was none."""


class _FromGalore(layerwise.LayerWise):
    """What the classes have in common: checkpoints of galore-torch load."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class's. A state of galore-torch is converted; see `load_checkpoint`."""
        if galore_checkpoint.is_of_galore(state_dict):
            state_dict = galore_checkpoint.converted(self, state_dict)
        super().load_state_dict(state_dict)


def _refuse(name: str, given: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for an argument that has another value than the one that works here. given: name →
    (value, the one that works)."""
    for argument, (value, works) in given.items():
        if value != works:
            raise ValueError(f"{name}({argument}={value!r}) has no counterpart in lowrank_kernels; leave {argument} at {works!r}")


class GaLoreAdamW(_FromGalore, optim.GaLoreAdamW):
    """lowrank_kernels.GaLoreAdamW with the arguments and defaults of galore_torch.GaLoreAdamW."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        _refuse("GaLoreAdamW", {"correct_bias": (correct_bias, True)})
        super().__init__(params, lr, betas, eps, weight_decay)


class GaLoreAdamW8bit(_FromGalore, optim.GaLoreAdamW):
    """lowrank_kernels.GaLoreAdamW with state_bits=8 in its low-rank groups, and the arguments and defaults of
    galore_torch.GaLoreAdamW8bit. Groups without rank have moments in the parameters' dtype."""

    preferred = {"state_bits": 8}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
    ) -> None:
        """optim_bits and min_8bit_size have no effect, the first one as in galore-torch."""
        fixed = {"amsgrad": (amsgrad, False), "args": (args, None), "percentile_clipping": (percentile_clipping, 100)}
        _refuse("GaLoreAdamW8bit", fixed | {"block_wise": (block_wise, True), "is_paged": (is_paged, False)})
        super().__init__(params, lr, betas, eps, weight_decay)


class GaLoreAdafactor(_FromGalore, optim.LowRankAdafactor):
    """LowRankAdafactor with dominant bases, and the arguments of galore_torch.GaLoreAdafactor.

    lr is the step size, as with relative_step=False and scale_parameter=False, which is what Trainer passes.
    Groups without rank are moved by AdamW.
    """

    fixed = {"selection": "dominant"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
    ) -> None:
        """scale_parameter, relative_step: only False. Left out they are False too, where galore-torch's are
        True; of scale_parameter a warning tells. eps: the second one belongs to scale_parameter."""
        if lr is None or relative_step:
            raise ValueError("GaLoreAdafactor has no relative steps here; pass lr and relative_step=False")
        _refuse("GaLoreAdafactor", {"scale_parameter": (bool(scale_parameter), False), "warmup_init": (warmup_init, False)})
        _refuse("GaLoreAdafactor", {"eps[0]": (eps[0], 1e-30)})
        if scale_parameter is None:
            warnings.warn(
                "galore_torch.GaLoreAdafactor scales its steps by the size of the weights unless scale_parameter=False, and this one does "
                "not; pass scale_parameter=False",
                UserWarning,
                stacklevel=2,
            )
        betas = (0.9 if beta1 is None else beta1, 0.999)
        own = dict(beta2_decay=decay_rate, clip_threshold=clip_threshold, first_moment=beta1 is not None)
        super().__init__(params, lr, betas, weight_decay=weight_decay, **own)


def install() -> None:
    """Makes `import galore_torch` and `import apollo_torch` resolve to this package in this process, whether
    or not the real ones are installed. What was imported from them before stays what it was.

    Hugging Face's Trainer then takes optim="galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "apollo_adamw" and their "_layerwise" variants from here. Checkpoints that the real ones have saved can be
    resumed from: torch.load(weights_only=True) reads their projectors as data. Resuming with a "_layerwise"
    variant is refused, since Trainer saves none of its moments. A second call changes nothing.
    """
    from . import apollo_torch

    names = [name for name in __all__ if name.startswith("GaLore")]
    for name, members in (
        ("galore_torch", {each: globals()[each] for each in names}),
        ("apollo_torch", {"APOLLOAdamW": apollo_torch.APOLLOAdamW}),
    ):
        if name in _replaced:
            continue
        _replaced[name] = sys.modules.get(name)
        module = types.ModuleType(name, f"lowrank_kernels under the names of {name}.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__file__)
        module.__file__ = __file__
        vars(module).update(members)
        sys.modules[name] = module
    torch.serialization.add_safe_globals([(galore_checkpoint.Projector, galore_checkpoint.PROJECTOR)])
    _forget_what_is_available()


def uninstall() -> None:
    """Puts back what `install` has replaced."""
    for name, module in _replaced.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    _replaced.clear()
    layerwise.undo()
    known = [each for each in torch.serialization.get_safe_globals() if each != (galore_checkpoint.Projector, galore_checkpoint.PROJECTOR)]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)
    _forget_what_is_available()


def _forget_what_is_available() -> None:
    """Makes transformers look anew whether the packages are there."""
    found = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_galore_torch_available", "is_apollo_torch_available"):
        clear = getattr(getattr(found, name, None), "cache_clear", None)
        if clear is not None:
            clear()
