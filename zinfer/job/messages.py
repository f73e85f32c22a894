"""Limits that the worker server and its driver agree on."""

from __future__ import annotations

MESSAGE_BYTES = 1 << 20
"""Longest message between them."""
CHILD_GRACE_S = 3.0
"""Workers of a dead driver clean up and end within this time; later they are killed."""
