"""Files that commands write are refused before anything is computed; progress is told in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_train_geo.errors import SpecError, StorageError
from ray_train_geo.outputs import PICTURES, require_writable, write_output
from ray_train_geo.ticker import Ticker


@pytest.mark.parametrize("name", ["new.png", "NEW.SVG"])
def test_a_file_that_can_be_written_is_not_touched(tmp_path: Path, name: str) -> None:
    require_writable("--picture", tmp_path / name, PICTURES)
    assert not list(tmp_path.iterdir())
    write_output("--picture", tmp_path / name, b"x")
    require_writable("--picture", tmp_path / name, PICTURES)
    assert (tmp_path / name).read_bytes() == b"x"


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--picture .*map.pdf: the name must end in .png or .svg"):
        require_writable("--picture", tmp_path / "map.pdf", PICTURES)
    with pytest.raises(StorageError, match="there is no folder"):
        require_writable("--out", tmp_path / "no" / "out.csv")
    with pytest.raises(StorageError, match="this is a folder"):
        require_writable("--out", tmp_path)
    with pytest.raises(StorageError, match="can't be written"):
        require_writable("--out", Path("/proc/none.csv"))
    with pytest.raises(StorageError, match="No space left on device"):
        write_output("--out", Path("/dev/full"), b"x")


def test_a_ticker_is_silent_until_it_is_due(capsys: pytest.CaptureFixture[str]) -> None:
    Ticker(every_s=1e3).show("too early")
    often = Ticker(every_s=0.0)
    often.show("1 of 2")
    often.show("2 of 2")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "1 of 2\n2 of 2\n")
