"""A callback for Lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning import Callback
except ImportError:  # the older package
    from pytorch_lightning import Callback


class DiagnosticsCallback(Callback):
    """Logs `optimizer.diagnostics(flat=True)` every `log_every_n_steps`: what the last refresh of each matrix
    has found, in groups with diagnostics=True."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for optimizer in trainer.optimizers:
                if hasattr(optimizer, "diagnostics"):
                    pl_module.log_dict(optimizer.diagnostics(flat=True))
