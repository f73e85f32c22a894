"""Multiply with weights that are stored in 8 or 4 bits, without unpacking them first."""
