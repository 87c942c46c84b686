"""When previews are due."""

import pytest


@pytest.mark.parametrize(
    ("total", "previews", "expected"),
    [
        (8, 0, set()),
        (8, 1, {4}),
        (8, 3, {2, 4, 6}),
        (2, 3, {1}),
        (1, 3, set()),
        (8, 10**12, {1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_previews_are_spread_evenly_and_never_after_the_last_step(total, previews, expected):
    from krea2_srt.messages import preview_steps

    assert preview_steps(total, previews) == expected
