"""Write outcomes to MLflow.

In: a RunConfig, the environment and an Outcome. Out: a run with params, metrics, tags, artifacts.
Never imports model, plan or worker: what they have to say reaches it inside the Outcome.
May import: machine, job, config, and the leaves.
"""
