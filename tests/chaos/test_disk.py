"""A disk that is full for a while."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tmpfs import mounted

from ray_train_geo.chaos.disk import mounted_disk
from ray_train_geo.errors import InputError


def test_full_and_free_again(tmp_path: Path) -> None:
    with mounted(tmp_path / "probe", "size=64k"):
        pass  # this machine lets us, or the test has ended here
    with mounted_disk() as disk:
        (disk.path / "before").write_bytes(b"x" * 10_000)
        disk.fill()
        assert disk.full
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (disk.path / "more").write_bytes(b"x" * 10_000)
        (disk.path / "before").unlink()
        (disk.path / "instead").write_bytes(b"x" * 4_000)
        disk.free()
        assert not disk.full
        (disk.path / "more").write_bytes(b"x" * 100_000)
    assert not disk.path.exists()


def test_refused_where_it_can_not_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.write_text("#!/bin/sh\necho 'mount: permission denied' >&2\nexit 32\n")
    mount.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="tmpfs: mount: permission denied; fill"), mounted_disk():
        raise AssertionError("nothing was mounted")
    mount.unlink()
    with pytest.raises(InputError, match="No such file or directory; fill"), mounted_disk():
        raise AssertionError("nothing was mounted")
