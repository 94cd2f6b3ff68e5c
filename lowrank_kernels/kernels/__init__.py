"""Implementations of the step per device: Triton on CUDA, batched PyTorch on a CPU. They know tensors, never optimizers.

Nothing is imported here, so that importing the package on a CPU stays free of Triton.
"""
