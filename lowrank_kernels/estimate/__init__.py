"""How much memory a training run takes, before it is begun. `python -m lowrank_kernels.estimate` prints it
for models by name.

memory.py: estimate_memory. held.py: what an optimizer keeps for one parameter; temporaries.py: of a step and
of a refresh; activations.py: of forward and backward passes. models.py: shapes of known models; llama.py: a
model of such shapes; command.py: the command.
"""

from .memory import METHODS, Memory, estimate_memory

__all__ = ["METHODS", "Memory", "estimate_memory"]
