"""What a release is checked for, on folders and a repository of the tests' own."""

import subprocess
import tomllib

import pytest

from tools import release


@pytest.fixture
def builds(tmp_path):
    """Two folders with the same file."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.whl").write_bytes(b"same")
    return tmp_path / "first", tmp_path / "second"


def test_two_equal_builds_get_their_sums(builds, capsys):
    """In the form that `sha256sum --check` reads."""
    assert release.main([str(path) for path in builds]) == 0
    digest, name = capsys.readouterr().out.split()
    assert name == "a.whl" and len(digest) == 64
    ended = subprocess.run(["sha256sum", "--check", "--quiet", release.SUMS], cwd=builds[0], check=False)
    assert ended.returncode == 0


def test_builds_that_differ_are_refused(builds, capsys):
    """By name: other bytes, and a file that only one build has."""
    (builds[1] / "a.whl").write_bytes(b"other")
    (builds[1] / "b.whl").write_bytes(b"more")
    assert release.main([str(path) for path in builds]) == 1
    err = capsys.readouterr().err
    assert (
        "a.whl: the two builds differ" in err
        and "b.whl: only in one" in err
        and not (builds[0] / release.SUMS).exists()
    )


def test_the_packages_can_be_released():
    """Versions of three numbers, and siblings' ranges that hold them."""
    assert release.unreleasable(release.PACKAGES) == []


def test_a_version_that_no_sibling_allows_is_named(monkeypatch):
    """As after a new minor version that dependants have not followed."""
    monkeypatch.setattr(release, "version_of", lambda package: "0.2.0" if package == "kernels" else "0.1")
    problems = "\n".join(release.unreleasable(release.PACKAGES))
    assert (
        "bufmgr: version must be MAJOR.MINOR.PATCH" in problems and "attention: requires 'longattn-kernels" in problems
    )


def test_the_earlier_tag_is_the_newest_but_this_versions(tmp_path):
    """Of this package alone; None before the first release."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    assert release.earlier_tag("kernels", tmp_path) is None
    for tag in ("kernels-v0.0.9", "kernels-v0.0.10", "bufmgr-v9.0.0", release.tag_of("kernels")):
        subprocess.run([*git, "tag", tag], check=True)
    assert release.earlier_tag("kernels", tmp_path) == "kernels-v0.0.10"


def test_a_version_is_released_once(monkeypatch):
    """Its tag names another commit: the version was to be raised."""
    monkeypatch.setattr(release, "tagged_elsewhere", lambda tag: tag == release.tag_of("kernels"))
    (problem,) = release.unreleasable(release.PACKAGES)
    assert problem == f"kernels: version {release.version_of('kernels')} is tagged already, at another commit"


def test_a_tag_of_this_commit_is_not_elsewhere(tmp_path):
    """Nor one that is not there."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"], ["tag", "here"], ["tag", "there"]):
        subprocess.run([*git, *words], check=True)
    assert not any(release.tagged_elsewhere(tag, tmp_path) for tag in ("here", "there", "nowhere"))
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "second"], check=True)
    assert release.tagged_elsewhere("there", tmp_path)


@pytest.mark.parametrize("package", release.PACKAGES)
def test_packages_have_addresses(package):
    """Each names at least one page, by https. A label ends at its first comma, and has at most 32 characters, so says the metadata's format."""
    path = release.ROOT / "packages" / package / "pyproject.toml"
    urls = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]
    assert urls and all(address.startswith("https://") for address in urls.values())
    assert all("," not in label and len(label) <= 32 for label in urls)
