"""Matrices that are spread over processes as DTensors: FSDP2's, HSDP's, and those of tensor parallelism.

layout.py says which part of each matrix a process holds, and which part of its state. refresh.py chooses
bases without a whole gradient in every process. step.py moves the weights.
"""

from .layout import Sharding, is_sharded, local, sharding_of

__all__ = ["Sharding", "is_sharded", "local", "sharding_of"]
