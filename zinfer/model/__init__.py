"""Describe a model's architecture and make its weights.

In: a catalogue name, a folder or a hub id. Out: a ModelSpec (sizes, parameters, KV cache layout),
counted on the meta device from transformers' own classes, and weights of that architecture.
May import: machine, job, config, and the leaves. transformers is imported inside functions only.
"""
