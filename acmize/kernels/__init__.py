"""Fused kernels for GPUs; nothing here is imported, and triton need not be there, until a kernel is wanted."""
