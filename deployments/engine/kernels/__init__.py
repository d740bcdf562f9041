"""Products of 16-bit activations and bitsandbytes' 4-bit and 8-bit weights, in Triton. See docs/kernels.md."""
