"""The ranks hold the model once between them."""

from __future__ import annotations

import pytest

NUMEL = [7, 16, 1000]


@pytest.mark.parametrize(
    ("held", "ranks", "is_right"),
    [
        (1023, 1, True),
        (1024, 2, True),  # 7 is padded to 8
        (4 * 1023, 4, False),  # a whole model on each rank
        (2 * 1023, 2, False),
        (512, 2, False),  # half of it is nowhere
        (0, 1, False),
    ],
)
def test_partitions_add_up_to_the_model(held: int, ranks: int, is_right: bool) -> None:
    from zinfer.worker.engines.zero import partition_problem

    problem = partition_problem(NUMEL, held, ranks)
    assert (problem is None) == is_right
    if problem:
        assert f"{ranks} ranks hold {held} elements, the model has 1023" in problem
