"""Reads runs that zinfer logged, compares them, and writes tables, figures and one report. It never measures."""
