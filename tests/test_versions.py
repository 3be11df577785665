"""How the tests went on other versions: what is noted, and the stubs that a torch for CUDA runs on."""

import ctypes
import shutil
import subprocess
import sys

import pytest

from tools import stub_libraries, versions

ROW = dict(zip(versions.COLUMNS, "3.11.7 2.11.0 1.26.0 x86_64 whole 5 0 1 2026-01-02 abc".split(), strict=True))  # noqa: SIM905


def test_results_are_counted(tmp_path):
    """Of every suite of a report."""
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert {"passed": "3", "failed": "3", "skipped": "3"} == versions.counted(report)


def test_a_row_replaces_that_of_the_same_versions(tmp_path):
    """Others stay, in the order of torch and Python."""
    file = tmp_path / "versions.csv"
    for changed in ({"torch": "2.11.0"}, {"torch": "2.9.0"}, {"torch": "2.11.0", "passed": "6"}):
        versions.note({**ROW, **changed}, file)
    assert [("2.9.0", "5"), ("2.11.0", "6")] == [(row["torch"], row["passed"]) for row in versions.rows(file)]


def test_no_version_fails():
    """What the guide shows: every noted version passed, and the lowest declared torch is among them."""
    noted = versions.rows()
    assert [] == [row for row in noted if row["failed"] != "0"]
    assert "2.11.0" in {row["torch"] for row in noted}


@pytest.mark.skipif(sys.platform != "linux", reason="stubs are ELF libraries")
@pytest.mark.skipif(not all(map(shutil.which, ("cc", "nm", "readelf", "ldd"))), reason="needs cc and binutils")
def test_a_library_runs_on_stubs(tmp_path):
    """One that needs a versioned function of a library that is gone loads, and the function says that there is no driver."""
    library, torch = tmp_path / "libgone.so.1", tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (tmp_path / "gone.c").write_text("int gone(void) { return 1; }")
    (tmp_path / "versions").write_text("GONE_1 { gone; };")
    (tmp_path / "user.c").write_text("int gone(void); int user(void) { return gone(); }")
    user = torch / "lib" / "libuser.so"
    script = f"-Wl,-soname,libgone.so.1,--version-script,{tmp_path / 'versions'}"
    subprocess.run(["cc", "-shared", "-fPIC", script, "-o", str(library), str(tmp_path / "gone.c")], check=True)
    words = ["cc", "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", "-o", str(user), str(tmp_path / "user.c"), str(library)]
    subprocess.run(words, check=True)
    library.unlink()
    assert [torch / "lib" / "libgone.so.1"] == stub_libraries.write_stubs(torch)
    assert ctypes.CDLL(str(user)).user() == stub_libraries.ERROR
    assert [] == stub_libraries.write_stubs(torch)
