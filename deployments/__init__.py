"""Headroom: 4-bit and 8-bit Hugging Face language models on many GPUs, on Ray Serve."""

__version__ = "0.1.0"
