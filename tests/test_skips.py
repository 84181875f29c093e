"""What ``conftest.py`` counts as success: a test that was skipped was not passed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("body", "env", "status"),
    [
        ("def test_a(): pass", {}, 0),
        ("import pytest\ndef test_a(): pytest.skip('no reason')", {}, 1),
        ("import pytest\ndef test_a(): pytest.skip('no reason')", {"JMLR_ALLOW_SKIPS": "1"}, 0),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert 0", {}, 1),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): pass", {}, 1),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass", {}, 1),
        ("def test_a(shared_data): pass\ndef test_b(): pass", {"JMLR_DATA": "/no/such/folder"}, 0),
        ("import pytest\ndef test_a(): pytest.skip('no browser at /x')", {}, 0),
    ],
)
def test_skips_fail(tmp_path: Path, body: str, env: dict[str, str], status: int) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(body)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JMLR_", "JAX_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        env=clean | env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert bool(done.returncode) == bool(status), done.stdout
    if status and "skip" in body:
        assert "skipped tests count as failures" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("s"), "pytest's own summary comes last"
