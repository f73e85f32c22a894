"""Limits that the worker server and its driver agree on."""

from __future__ import annotations

MESSAGE_BYTES = 1 << 20
"""Longest message between them."""
CHILD_GRACE_S = 3.0
"""After the driver's death its workers remove their swap folders and end by themselves; later they are killed."""
