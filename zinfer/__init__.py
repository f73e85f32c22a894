"""zinfer: how fast a model generates when its weights or its KV cache do not fit the accelerator, and how far that is from what the hardware allows."""

__version__ = "0.1.0"
