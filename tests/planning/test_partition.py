from __future__ import annotations

import pytest

from ray_train_geo.planning.partition import even


@pytest.mark.parametrize(
    ("layers", "stages", "boundaries"),
    [(8, 2, (0, 4, 8)), (10, 4, (0, 3, 6, 8, 10)), (3, 3, (0, 1, 2, 3)), (5, 1, (0, 5))],
)
def test_even(layers, stages, boundaries):
    assert even(layers, stages) == boundaries


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (3, 0)])
def test_even_refuses_stages_without_layers(layers, stages):
    with pytest.raises(ValueError, match="at least one layer"):
        even(layers, stages)
