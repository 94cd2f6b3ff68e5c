"""Training over several processes."""

from .compress import CompressedGradients, compress_gradients

__all__ = ["CompressedGradients", "compress_gradients"]
