"""Triton kernels of vlp_fast, imported as `vlp_fast.kernels`; nothing is imported here."""
