"""Products of a few rows with 16-bit weights that are not packed."""
