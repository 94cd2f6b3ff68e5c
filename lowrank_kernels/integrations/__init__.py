"""The library where people train: in Hugging Face's Trainer, and under the names of galore-torch.

Each module imports its framework, which this package does not require.
"""
