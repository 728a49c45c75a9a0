"""Triton kernels and their launchers, one file per op; installed as ``transkd_fast.kernels``."""
