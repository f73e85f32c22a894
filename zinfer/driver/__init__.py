"""Start one worker, watch it, and end the job truthfully whatever happened.

In: a RunConfig and a job folder. Out: an Outcome, stored, shown and tracked.
Imports neither torch nor transformers nor deepspeed.
May import: tracking, plan, model, machine, job, config, and the leaves.
"""
