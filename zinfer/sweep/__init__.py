"""Run many jobs: plan them, reuse what is there, show and end the whole.

In: Hydra's composed sweep. Out: SWEEP_DIR/sweep.json, one folder for each job, one table.
May import: driver and every room that driver may import.
"""
