"""Measure this machine, so that predictions hold for it.

In: timed kernels and small jobs. Out: a calibration profile, kept for later runs.
May import: driver and every room that driver may import.
"""
