"""Run one job: load the weights, time the generation, report every sample.

In: a job folder. Out: events in that folder; the last one is the result.
The only room whose modules import torch, transformers and deepspeed.
`python -m zinfer.worker JOB_DIR` runs once for each rank. Never talks to MLflow.
May import: plan, model, machine, job, config, and the leaves.
"""
