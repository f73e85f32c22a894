"""Find out what this machine has and can do.

In: /proc, control groups, nvidia-smi, mounts, compilers, calibration profiles.
Out: Hardware, the environment record, and DeepSpeed's compiled ops.
May import: job, config, and the leaves. Unknown numbers are None.
"""
