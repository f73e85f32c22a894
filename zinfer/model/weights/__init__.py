"""Get weights from random numbers (dummy), from a checkpoint (pretrained), or the demo model.

`checkpoint` reads the headers of a checkpoint's files, `rehearsal` loads it on paper, `pretrained`
loads it, and `verified` makes sure that every weight came from it.
"""
