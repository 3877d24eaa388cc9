"""Multipole attention: the algorithm in PyTorch (`reference`) and its Triton kernels."""
