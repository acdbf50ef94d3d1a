"""Block-sparse pruning for self-attention models, with the kernels that make it fast."""
