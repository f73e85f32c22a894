"""Comparisons -> tables, one module for each question that a table answers."""
