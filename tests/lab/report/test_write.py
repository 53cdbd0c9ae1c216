"""Files are written whole or not at all."""

import os
import stat
import subprocess
import sys

import pytest

from flexnorm.lab.charts import write_text
from flexnorm.lab.report import picture, write_report


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_rights(tmp_path):
    old = os.umask(0o027)
    try:
        path = write_text(tmp_path / "x.html", "ä")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() == "ä".encode()


def test_folders_that_cannot_be_reported_on(tmp_path):
    for call in (write_report, lambda out: picture(out, tmp_path / "p.svg")):
        with pytest.raises(FileNotFoundError, match="flexnorm compare --out"):
            call(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "x", "")


def test_a_report_needs_no_torch():
    code = "import sys, flexnorm.lab.report; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
