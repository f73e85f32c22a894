"""Quantised weights: how they are packed, loaded and multiplied. docs/quantised.md describes them.

A packed weight is one flat parameter of the compute type: all codes, then all scales, as bit
patterns. So DeepSpeed partitions, swaps and gathers exactly the stored bytes.
"""
