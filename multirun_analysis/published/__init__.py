"""Published results beside measured ones, normalised to what each one's hardware allows.

Hardware differs, so tokens/s alone do not compare. Every forward pass of an offloaded model reads
every weight over one link. The bytes of the weights over the time of a pass are the bandwidth that
a result implies, and its share of the link's own bandwidth compares across boxes.
"""
