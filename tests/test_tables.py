"""Tables that functions yield part by part."""

import pandas as pd
import pytest

from paper_lib.errors import ConfigError, require
from paper_lib.experiments.tables import tabulated


@tabulated
def example(n):
    """What it says."""
    require(n > 0, "n", n, "it must be positive")
    yield {"seed": 0, "x": 1.5}
    yield {"seed": 1, "x": [2.5] * n}
    yield pd.DataFrame({"seed": [2], "x": [3.5]})


def test_rows_columns_and_frames_follow_each_other():
    table = example(2)
    assert table.to_dict("list") == {"seed": [0, 1, 1, 2], "x": [1.5, 2.5, 2.5, 3.5]}
    assert table.index.tolist() == [0, 1, 2, 3] and example.__doc__ == "What it says."


def test_settings_are_checked_when_it_is_called():
    with pytest.raises(ConfigError, match="n = 0"):
        example(0)
