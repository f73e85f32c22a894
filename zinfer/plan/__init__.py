"""Predict a run before anything is allocated.

In: RunConfig, ModelSpec and Hardware. Out: bytes per memory tier, the DeepSpeed JSON,
the fastest speed that the hardware allows (ceiling), and the predicted time. All pure functions.
May import: model, machine, job, config, and the leaves.
"""
