"""How fast a model generates when its weights or its KV cache do not fit the accelerator, and how far from the hardware's limit that is."""

__version__ = "0.1.0"
