"""Pictures of a run: what cannot be read is one clear line, not an empty picture."""

import pytest

from flashbone.errors import FormatError
from flashbone.train.report import plot_losses, plot_rotations


@pytest.mark.parametrize("draw", [plot_losses, plot_rotations])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, r"metrics\.jsonl: no such file"),
        ('{"step": 1, "loss": 2.0}\noops\n{"step": 2, "loss": 1.0}\n', r"metrics\.jsonl:2: not valid JSON"),
        ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', r"metrics\.jsonl:2: not valid JSON"),
    ],
)
def test_metrics_that_cannot_be_read_are_one_line_and_no_picture(tmp_path, draw, content, problem):
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "picture.png"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(FormatError, match=problem) as caught:
        draw(metrics, target)
    assert "\n" not in str(caught.value)
    assert not target.exists()
