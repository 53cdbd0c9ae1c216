"""The code of the guide runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "shift.md"


@pytest.mark.slow
@pytest.mark.skipif(not GUIDE.exists(), reason="the guide is not part of this distribution")
def test_guide(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), space)
    assert float(space["apart"]) > 8  # type: ignore[arg-type]
    assert float(space["moved"]) == pytest.approx(0.08, rel=1e-3)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert len(re.findall(r"W1 = .* % of the spread", printed)) == 3
    picture = (tmp_path / "shift.svg").read_text(encoding="utf-8")
    assert picture.count("<path") >= 9, "line, band and dotted line of three layers"
    assert all(f"layer{number}.norm" in picture for number in (1, 2, 3))
    assert printed.count("statistics noise") >= 3
    assert re.search(r"256 32\.0+\d* 64\.0+\d* 2\.0", printed)
