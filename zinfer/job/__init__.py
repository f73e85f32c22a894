"""Records that the processes of one job hand each other: folder, events, swap folder, outcome.

In: a checked RunConfig. Out: files in the job's folder, and the value that says how a job ended.
Everything here is small, plain and free of torch, so that driver and worker share it.
May import: config, and the leaves (units, redact, cache).
"""
