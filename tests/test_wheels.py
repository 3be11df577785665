"""Each wheel holds its own folder of the namespace and nothing else; the nox sessions `wheel-*` then install it."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheel_contents import faults
from tests.workspace import PACKAGES, ROOT


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_only_its_own(package: str, tmp_path: Path) -> None:
    """A freshly built wheel has no fault."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH; ./run test puts it there")
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    command = [uv, "build", "--wheel", "--out-dir", str(tmp_path), str(ROOT / "packages" / package)]
    built = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert [] == faults(wheel)


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ("longattn/__init__.py", "outside longattn/kernels/"),
        ("longattn/bufmgr/spec.py", "outside longattn/kernels/"),
        ("tests/test_x.py", "outside longattn/kernels/"),
        ("longattn/kernels/tests/test_x.py", "holds the test"),
    ],
)
def test_a_stray_file_is_noticed(extra: str, fault: str, tmp_path: Path) -> None:
    """The check finds each kind of stray file, and nothing in a clean wheel."""
    wheel = tmp_path / "longattn_kernels-0.1.0-py3-none-any.whl"
    own = ["longattn/kernels/__init__.py", "longattn/kernels/py.typed", "longattn_kernels-0.1.0.dist-info/METADATA"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in own:
            archive.writestr(name, "")
    assert [] == faults(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(extra, "")
    assert [fault in sentence for sentence in faults(wheel)] == [True]
