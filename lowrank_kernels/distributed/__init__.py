"""Training over several processes."""

from .compress import CompressedGradients, compress_gradients
from .placement import shard_placement

__all__ = ["CompressedGradients", "compress_gradients", "shard_placement"]
