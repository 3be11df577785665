"""Sessions per package. Each installs ONLY its package and what that package declares; upper floors must be absent.

`./run nox --list` shows them. What a package declares is read from its own pyproject.toml, never repeated here.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["floors"]
nox.options.error_on_missing_interpreters = False  # they skip with a reason, on CI too

ROOT = Path(__file__).parent
WORKSPACE: dict[str, Any] = nox.project.load_toml(ROOT / "pyproject.toml")
PACKAGES = ("bufmgr", "patterncache", "kernels", "attention")  # bottom up
OTHER_PYTHONS = ("3.12", "3.13", "3.14")
# Of `versions`: (Python, torch, numpy). The declared floor, each torch since, and the newest that is to be had, which is "".
VERSIONS = (
    ("3.11", "2.11.0", "1.26.0"),
    ("3.11", "2.12.1", ""),
    ("3.11", "2.13.0", ""),
    ("3.11", "2.14.1", ""),
    ("3.11", "", ""),
    ("3.12", "", ""),
    ("3.13", "", ""),
)
# What they run besides `SMOKE`: where torch's versions differ. `-- --whole` runs all tests.
SENSITIVE = {
    "bufmgr": ("test_bufmgr_visibility", "test_bufmgr_policies"),
    "patterncache": (),
    "kernels": ("test_compile", "test_transforms", "test_prepared", "test_scale"),
    "attention": ("test_packed_compiled", "test_modules", "test_ring_buffer_saved"),
}
# Of `secure`: files that are damaged, planted or forged, and values that no caller should give.
HOSTILE = {
    "bufmgr": ("test_bufmgr_bad_input", "test_bufmgr_odd_values"),
    "patterncache": ("test_hostile_input", "test_limits", "test_wire"),
    "kernels": (
        "test_native_library",
        "test_native_bad_input",
        "test_bad_input",
        "test_choosing",
        "test_triton_self_check",
    ),
    "attention": ("test_ring_buffer_saved", "test_ring_buffer_bad_input", "test_misuse"),
}
REFUSED = (
    "packages/patterncache/tests/test_hostile_input.py",
    "packages/attention/tests/test_ring_buffer_saved.py",
    "packages/kernels/tests/test_native_bad_input.py",
)
# Of `peers`: {checkout: (our overlay of it, tests of theirs, or of ours over their code)}.
PEERS = {
    "dilated-attention-pytorch": ("fkodom", ("tests",)),
    "ring-attention-pytorch": ("lucidrains", ("tools/peers/test_lucidrains.py",)),
    "torchscale": ("", ("tools/peers/test_torchscale.py",)),
}
WORKERS = (
    "--numprocesses=auto",
    "--dist=worksteal",
)  # of pytest-xdist: one a core; who has no test left takes some of another's

# `-- --smoke` runs these of a package and collects the rest: each public way in once, on what is installed. CI does so, because
# `./run test` has already run every test from the checkout.
SMOKE = {
    "bufmgr": ("test_bufmgr_names", "test_bufmgr_manager", "test_bufmgr_release"),
    "patterncache": ("test_named_patterns", "test_cache", "test_exports"),
    "kernels": ("test_states", "test_attend", "test_environment"),
    "attention": ("test_pattern_attention", "test_projections"),
}


def metadata(package: str) -> dict[str, Any]:
    """Return the [project] table of one package."""
    return nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")["project"]


def declared(package: str) -> list[str]:
    """Return the distributions that a package names as dependencies, without versions."""
    return [re.split(r"[^A-Za-z0-9_.-]", dependency, maxsplit=1)[0] for dependency in metadata(package)["dependencies"]]


def closure(package: str) -> list[str]:
    """Return the package and every sibling below it, bottom up."""
    below = {name.removeprefix("longattn-") for name in declared(package) if name.startswith("longattn-")}
    found = {package}.union(*(closure(name) for name in below))
    return [name for name in PACKAGES if name in found]


def supported() -> list[tuple[str, ...]]:
    """Return each set of packages that has all that its own stand on: what somebody may have installed."""
    sets = (names for size in range(1, len(PACKAGES) + 1) for names in itertools.combinations(PACKAGES, size))
    return [names for names in sets if all(set(closure(name)) <= set(names) for name in names)]


def group(*names: str) -> list[str]:
    """Return the requirements of dependency groups of the workspace."""
    return list(nox.project.dependency_groups(WORKSPACE, *names))


def constraints(session: nox.Session) -> list[str]:
    """Return pip options that hold the session to the workspace's constraints."""
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(WORKSPACE["tool"]["uv"]["constraint-dependencies"]) + "\n", encoding="utf-8")
    # --no-sources: a sibling comes only from what is named on the command line, never silently from the workspace.
    return ["--constraint", str(path), "--no-sources"]


def from_checkout(package: str, extras: str = "testing") -> list[str]:
    """Return requirements for the package with extras, and plain ones for the siblings it declares."""
    paths = {name: str(ROOT / "packages" / name) for name in closure(package)}
    paths[package] += f"[{extras}]" if extras else ""
    return [word for path in paths.values() for word in ("--editable", path)]


def check_floors(session: nox.Session, packages: Sequence[str], kind: str, python: str = "python") -> None:
    """Fail unless what is declared can be imported and what is not cannot."""
    there = [name for name in PACKAGES if any(name in closure(package) for package in packages)]
    needs_torch = any("torch" in declared(name) for name in there)
    absent = [f"longattn.{name}" for name in PACKAGES if name not in there] + ([] if needs_torch else ["torch"])
    present = ",".join(f"longattn.{name}" for name in there)
    session.run(python, "-P", "tests/installed_floors.py", kind, present, ",".join(absent), external=python != "python")


def run_tests(session: nox.Session, package: str, *options: str) -> None:
    """Run one package's tests, or with `-- --smoke` a few; other arguments after `--` go to pytest."""
    folder, arguments = f"packages/{package}/tests", list(session.posargs)
    if "--smoke" not in arguments:
        session.run("pytest", *WORKERS, folder, *options, *arguments)
        return
    arguments.remove("--smoke")
    # Collecting imports every test's module: what it needs and the package does not declare is missing here.
    session.run("pytest", "--collect-only", "-qq", folder, *options)
    files = [f"{folder}/{name}.py" for name in SMOKE[package]]
    session.run("pytest", *WORKERS, *files, "-m", "not slow", *arguments)


def test(session: nox.Session, package: str) -> None:
    """Test the package from the checkout, with nothing above it installed."""
    # Where a package has Triton kernels, they are tested in triton's interpreter, which needs no GPU.
    extras = "testing,triton" if "triton" in metadata(package)["optional-dependencies"] else "testing"
    session.install(*constraints(session), *from_checkout(package, extras), *group("test"))
    check_floors(session, [package], "editable")
    run_tests(session, package)


def types(session: nox.Session, package: str) -> None:
    """Check the package's types where only it and every extra it declares are installed."""
    extras = ",".join(metadata(package)["optional-dependencies"])
    session.install(*constraints(session), *from_checkout(package, extras), *group("test", "types"))
    folder = Path(session.create_tmp()).resolve()
    settings = {**WORKSPACE["tool"]["pyright"], "extraPaths": [], "exclude": ["**/__pycache__"]}
    # pyright takes only paths relative to its settings.
    settings["include"] = [os.path.relpath(ROOT / "packages" / package / "src", folder)]
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    python = session.run("python", "-c", "import sys; print(sys.executable)", silent=True)
    session.run("pyright", "--project", str(config), "--pythonpath", str(python).strip())


def lint(session: nox.Session, package: str) -> None:
    """Check style and format of one package."""
    session.install(*group("lint"))
    session.run("ruff", "check", f"packages/{package}")
    session.run("ruff", "format", "--check", f"packages/{package}")


def wheel(session: nox.Session, package: str) -> None:
    """Build wheels, install them into an empty environment, and run the quick tests against the installed files."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    wheels = {}
    for name in closure(package):
        session.run_install(
            "uv",
            "build",
            "--quiet",
            "--no-sources",
            "--wheel",
            "--out-dir",
            str(dist),
            f"packages/{name}",
            external=True,
        )
        (wheels[name],) = dist.glob(f"longattn_{name}-*.whl")
    session.run("python", "tests/wheel_contents.py", *(str(path) for path in wheels.values()))
    requirements = [f"{path}[testing]" if name == package else str(path) for name, path in wheels.items()]
    session.install(*constraints(session), *requirements, *group("test"))
    check_floors(session, [package], "wheel")
    # Slow ones tell nothing more about a wheel; the checkout's session runs them.
    run_tests(session, package, "-m", "not slow")


def install_or_skip(session: nox.Session, *requirements: str) -> None:
    """Install, or skip the session with the reason when no wheel fits this machine."""
    command = ("uv", "pip", "install", "--quiet", *requirements)
    answer = session.run_install(*command, "--dry-run", external=True, silent=True, success_codes=[0, 1, 2], log=True)
    if answer and ("No solution found" in str(answer) or "no wheel" in str(answer).lower()):
        session.skip(f"no wheels to be had here: {' '.join(str(answer).split())[:300]}")
    session.install(*requirements)


def test_min(session: nox.Session, package: str) -> None:
    """Test the package with the lowest versions that it declares."""
    named = [word for name in closure(package) for word in metadata(name)["dependencies"] if "longattn-" not in word]
    # --no-config: the workspace's constraints would hold torch at its newest.
    options = ["--no-config", "--resolution", "lowest-direct", "--no-sources"]
    requirements = [*options, *from_checkout(package), *named, *group("test")]
    install_or_skip(session, *requirements)
    run_tests(session, package)


for _package in PACKAGES:
    for _check in (test, types, lint, wheel, test_min):
        nox.session(name=f"{_check.__name__.replace('_', '-')}-{_package}")(
            functools.update_wrapper(functools.partial(_check, package=_package), _check)
        )


for _version in OTHER_PYTHONS:

    @nox.session(name=f"test-py-{_version}", python=_version, download_python="never")
    def test_python(session: nox.Session) -> None:
        """Test every package on another Python, where it and wheels for it are to be had."""
        editable = [word for name in PACKAGES for word in ("--editable", f"packages/{name}[testing]")]
        install_or_skip(session, *constraints(session), *editable, *group("test"))
        session.run("pytest", *WORKERS, *(f"packages/{name}/tests" for name in PACKAGES), *session.posargs)


@nox.session(download_python="never")
@nox.parametrize("python,torch,numpy", VERSIONS)
def versions(session: nox.Session, torch: str, numpy: str) -> None:
    """Test all packages with one torch and numpy on one Python, and note what passed in docs/versions.csv, which a page of the guide shows.

    torch comes without its dependencies: where it is built for CUDA, stubs stand in for CUDA's libraries. Arguments after `--`: `--whole` for every
    test rather than those that versions make fail; others go to pytest.
    """
    install_or_skip(session, "--no-config", "--no-deps", f"torch=={torch}" if torch else "torch")
    needs = "import importlib.metadata as m; print(*(r.replace(' ', '') for r in m.requires('torch') if 'extra' not in r), sep='|')"
    named = str(session.run("python", "-c", needs, silent=True)).strip().split("|")
    own = [one for one in named if not re.match(r"nvidia-|cuda-|triton|pytorch-triton", one)]
    numbers = f"numpy=={numpy}" if numpy else "numpy"
    session.install("--no-config", *own, numbers, *group("test"), "rich", "shtab")
    session.install("--no-config", "--no-deps", "--no-sources", *from_checkout("attention", ""))
    session.run("python", "-m", "tools.stub_libraries", silent=True)
    arguments = list(session.posargs)
    whole = "--whole" in arguments
    if whole:
        arguments.remove("--whole")
    paths = [
        f"packages/{name}/tests" + (f"/{file}.py" if file else "")
        for name in PACKAGES
        for file in ([""] if whole else [*SMOKE[name], *SENSITIVE[name]])
    ]
    report = Path(session.create_tmp()).resolve() / "report.xml"
    session.run("pytest", *WORKERS, *paths, "-m", "not slow", f"--junitxml={report}", *arguments, success_codes=[0, 1])
    session.run("python", "-m", "tools.versions", str(report), "whole" if whole else "sensitive")


@nox.session
def install(session: nox.Session) -> None:
    """Run the README's install command of each package in an empty environment, then the blocks of the package's README."""
    commands = re.findall(r"`pip (install(?: \./packages/\w+)+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    if len(commands) != len(PACKAGES):
        session.error(f"README.md must name one install command per package, got {commands}")
    for package, command in zip(PACKAGES, commands, strict=True):
        session.run_install("uv", "venv", "--clear", "--quiet", session.virtualenv.location, external=True)
        session.run_install("uv", "pip", "--quiet", *command.split(), *constraints(session), external=True)
        check_floors(session, [package], "wheel")
        session.run("python", "-P", "tests/readme_blocks.py", f"packages/{package}/README.md")


@nox.session
def floors(session: nox.Session) -> None:
    """Check the import contracts: arrows point only down."""
    session.install("--no-deps", *from_checkout("attention", ""))  # the contracts read source, they run nothing
    session.install(*group("floors"))
    session.run("lint-imports", "--no-cache")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages, a warning is an error; then walk every link and, where a Chromium is at hand, look at every page in it."""
    extras = {"patterncache": "torch", "kernels": "testing"}
    editable = [
        f"--editable=packages/{name}[{extras[name]}]" if name in extras else f"--editable=packages/{name}"
        for name in PACKAGES
    ]
    session.install(*constraints(session), *editable, *group("docs", "test"))
    site = (ROOT / "docs" / "_build" / "html").resolve()
    shutil.rmtree(site, ignore_errors=True)
    # -E: figures and tables come from code and rows, whose changes Sphinx does not see.
    session.run("sphinx-build", "-q", "-E", "-W", "--keep-going", "-b", "html", "docs", str(site))
    session.run("pytest", "tests/test_site.py", *session.posargs, env={"LONGATTN_SITE": str(site)})


@nox.session
def bench(session: nox.Session) -> None:
    """Run the shortest benchmark once, to see that it still runs; its figures mean nothing."""
    session.install(*constraints(session), *from_checkout("attention"), *group("test"))
    session.run("python", "-m", "benchmarks.run", "--quick", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the packages' tests, or those named after `--`, and print which lines and branches no test enters."""
    extras = {"kernels": "testing,triton", "patterncache": "testing,torch"}
    editable = [f"--editable=packages/{name}[{extras.get(name, 'testing')}]" for name in PACKAGES]
    session.install(*constraints(session), *editable, *group("test", "coverage"))
    session.env["COVERAGE_FILE"] = str(Path(session.create_tmp()).resolve() / "data")
    tests = session.posargs or [f"packages/{name}/tests" for name in PACKAGES]
    session.run("pytest", *WORKERS, "--cov", "--cov-report=term:skip-covered", *tests)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the native row's tests on a library built with the address and undefined-behaviour sanitizers; a finding ends the run."""
    session.install(*constraints(session), *from_checkout("kernels"), *group("test"))
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        path = str(session.run("c++", f"-print-file-name={name}", external=True, silent=True)).strip()
        if not Path(path).is_absolute():
            session.skip(f"the compiler has no {name}")
        runtimes.append(path)
    environment = {
        "LD_PRELOAD": " ".join(runtimes),  # Python itself is not built with them
        "ASAN_OPTIONS": "detect_leaks=0",  # what Python keeps until it ends is no leak of ours
        "LONGATTN_CACHE": str(Path(session.create_tmp()).resolve() / "libraries"),
        "LONGATTN_NATIVE_FLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    tests = [
        f"packages/kernels/tests/test_{name}.py"
        for name in ("native_rows", "native_short", "native_decode", "native_bad_input", "native_lowering", "paged")
    ]
    session.run("pytest", *tests, *session.posargs, env=environment)
    # Products in tiles, on any processor: those tests, and every call of the others that names no level.
    tiled = [*(name for name in tests if "bad_input" not in name), "packages/kernels/tests/test_native_tiles.py"]
    session.run(
        "pytest",
        *tiled,
        "-k",
        "not forced_level",
        *session.posargs,
        env={**environment, "LONGATTN_NATIVE": "amx-plain"},
    )


@nox.session
def secure(session: nox.Session) -> None:
    """Try damaged, planted and hostile files, texts and sizes, and odd values in every public signature: with asserts, then without (`python -O`)."""
    session.install(*constraints(session), *from_checkout("attention"), *group("test"), "rich", "shtab", "matplotlib")
    hostile = [f"packages/{package}/tests/{name}.py" for package, names in HOSTILE.items() for name in names]
    session.run("pytest", *WORKERS, *hostile, "tests/test_odd_values.py", *session.posargs)
    # pytest's own asserts are gone too, but not `pytest.raises`: what is refused is refused without an assert of ours.
    session.run("python", "-O", "-m", "pytest", "-q", "-p", "no:warnings", *REFUSED, *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run ten million operations on buffers, from random and recorded traces, with every invariant checked on the way."""
    session.install(*constraints(session), *from_checkout("bufmgr"), *group("test"))
    environment = {"LONGATTN_SOAK_OPERATIONS": "10000000"}
    session.run(
        "pytest", "packages/bufmgr/tests/test_bufmgr_soak.py", "--timeout=7200", *session.posargs, env=environment
    )


@nox.session
def numa(session: nox.Session) -> None:
    """Boot a machine with two NUMA nodes under emulation and check where every page is; skip with a reason where none can be booted."""
    session.install(*constraints(session), *from_checkout("bufmgr", ""))
    command = ("python", "-m", "tools.numa_guest", *session.posargs)
    reason = session.run(*command, "--dry-run", silent=True, success_codes=[0, 77])
    if reason:
        session.skip(str(reason).strip())
    session.run(*command)


@nox.session
def mutants(session: nox.Session) -> None:
    """Put a seeded sample of faults into copies of the source: tests notice 90 % of them at least, and the others are listed with a reason."""
    extras = {"kernels": "testing", "patterncache": "testing,torch"}
    editable = [f"--editable=packages/{name}[{extras.get(name, 'testing')}]" for name in PACKAGES]
    session.install(*constraints(session), *editable, *group("test"))
    session.run("python", "-m", "tools.mutants", *(session.posargs or ["--jobs", str(os.cpu_count() or 1)]))


@nox.session
def release(session: nox.Session) -> None:
    """Build what people would install, twice, and check it; into the folder named after `--`, else a temporary one. Uploads and tags nothing.

    Source distributions and wheels are built without a network and have the same bytes in both builds, install without an index in every combination
    that can be, change nothing else that is installed, and hold no name fewer than the package's last tag unless it is deprecated. Beside them lie
    release notes from the news fragments, a bill of materials and checksums.
    """
    dist = Path(session.posargs[0] if session.posargs else Path(session.create_tmp()) / "dist").resolve()
    again = Path(session.create_tmp()).resolve() / "again"
    committed = session.run("git", "log", "-1", "--format=%ct", external=True, silent=True)
    session.env["SOURCE_DATE_EPOCH"] = str(committed).strip()
    for folder in (dist, again):
        shutil.rmtree(folder, ignore_errors=True)
        for package in PACKAGES:
            words = (
                "uv",
                "build",
                "--quiet",
                "--offline",
                "--no-sources",
                "--out-dir",
                str(folder),
                f"packages/{package}",
            )
            session.run_install(*words, external=True)
    session.run("python", "tests/wheel_contents.py", *(str(path) for path in sorted(dist.glob("*.whl"))))
    session.install(*group("release"))
    for package in PACKAGES:
        version = metadata(package)["version"]
        notes = session.run(
            "towncrier",
            "build",
            "--draft",
            "--version",
            version,
            "--dir",
            f"packages/{package}",
            silent=True,
            stderr=None,
        )
        (dist / f"longattn-{package}-{version}.md").write_text(str(notes), encoding="utf-8")
        before = session.run(
            "python", "-c", f"from tools.release import earlier_tag; print(earlier_tag({package!r}) or '')", silent=True
        )
        if before and (tag := str(before).strip()):
            session.run(
                "griffe", "check", f"longattn.{package}", "--search", f"packages/{package}/src", "--against", tag
            )
        else:
            session.log(f"{package} has no earlier tag: no name can have vanished")
    # As users do: what is declared, then ours from the folder alone. Each set of packages that can be without the others, from wheels and from sources.
    home = Path(session.create_tmp()).resolve() / "user"
    python = str(home / "bin" / "python")
    into = ("uv", "pip", "install", "--quiet", "--python", python)
    freeze = "from importlib.metadata import distributions as d; print(sorted((x.name, x.version) for x in d() if 'longattn' not in x.name))"
    for names in supported():
        ours = [f"longattn-{name}" for name in names]
        others = {word for name in names for word in metadata(name)["dependencies"] if not word.startswith("longattn-")}
        for from_source in (False, True):
            session.run_install("uv", "venv", "--clear", "--quiet", str(home), external=True)
            session.run_install(*into, *constraints(session), *sorted(others), external=True)
            had = session.run(python, "-c", freeze, silent=True, external=True)
            sources = [word for name in ours for word in ("--no-binary", name)] if from_source else []
            offline = ("--offline", "--no-cache", "--no-index", "--find-links", str(dist))
            session.run_install(*into, *offline, *sources, *ours, external=True)
            if session.run(python, "-c", freeze, silent=True, external=True) != had:
                session.error(f"installing {', '.join(ours)} changed what was there: {had}")
            check_floors(session, names, "wheel", python)
    session.run(
        "cyclonedx-py", "environment", "--output-reproducible", "--of", "JSON", "-o", str(dist / "longattn.cdx.json"), python
    )  # fmt: skip
    for folder in (dist, again):
        (folder / ".gitignore").unlink()  # uv's own
    for made in (*dist.glob("*.md"), *dist.glob("*.json")):
        shutil.copy(made, again)  # made once: what differs between builds is asked of archives
    session.run("python", "-m", "tools.release", str(dist), str(again))


@nox.session
def peers(session: nox.Session) -> None:
    """Run other libraries' own tests on our attention; `-- FOLDER` has checkouts of them, and nothing is fetched: skipped where there is none."""
    if not session.posargs:
        session.skip(f"name a folder with checkouts of {', '.join(PEERS)} after --; none is fetched")
    folder, *arguments = session.posargs
    there = {name: Path(folder).resolve() / name for name in PEERS if (Path(folder) / name).is_dir()}
    if not there:
        session.skip(f"{folder} has none of {', '.join(PEERS)}")
    session.install(
        *constraints(session), *from_checkout("attention"), *group("test"), "einops", "beartype", "click", "jaxtyping"
    )
    overlays = ROOT / "tools" / "peers" / "overlays"
    torchscale = [str(there["torchscale"])] if "torchscale" in there else []
    for name, checkout in there.items():
        overlay, tests = PEERS[name]
        paths = [str(overlays / overlay)] * bool(overlay) + [str(ROOT), *torchscale]
        files = [str(ROOT / path) if path.startswith("tools/") else str(checkout / path) for path in tests]
        plugin = ["-p", "tools.peers.fkodom_differences"] if overlay == "fkodom" else []
        words = [
            "pytest",
            "-q",
            "-ra",
            "-c",
            os.devnull,
            f"--rootdir={checkout}",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
        ]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "LONGATTN_PEER": str(checkout), "OMP_NUM_THREADS": "1"}
        session.run(*words, *plugin, *files, *arguments, env=environment)


@nox.session(name="platform-wheels")
def platform_wheels(session: nox.Session) -> None:
    """Make the wheels of kernels that have the native row prebuilt, into the folder named after `--`, and try this machine's without a compiler."""
    dist = Path(session.posargs[0] if session.posargs else Path(session.create_tmp()) / "dist").resolve()
    committed = session.run("git", "log", "-1", "--format=%ct", external=True, silent=True)
    session.env["SOURCE_DATE_EPOCH"] = str(committed).strip()
    for package in ("patterncache", "kernels"):
        words = ("uv", "build", "--quiet", "--no-sources", "--wheel", "--out-dir", str(dist), f"packages/{package}")
        session.run_install(*words, external=True)
    (pure,) = dist.glob("longattn_kernels-*-none-any.whl")
    install_or_skip(session, *constraints(session), *from_checkout("kernels", "compiler"), "auditwheel", "wheel")
    session.run("python", "-m", "tools.platform_wheels", str(pure), str(dist))
    session.run("python", "tests/wheel_contents.py", *map(str, sorted(dist.glob("*.whl"))))
    # An environment as a user's: pip's choice among the wheels of the folder, no compiler on PATH, none from a wheel.
    session.run_install("uv", "venv", "--clear", "--quiet", session.virtualenv.location, external=True)
    session.install(*constraints(session), "torch", "numpy")
    offline = ("--no-index", "--find-links", str(dist), "longattn-kernels")
    session.run_install("uv", "pip", "install", "--quiet", *offline, external=True)
    python = str(Path(session.virtualenv.location).resolve() / "bin" / "python")
    nowhere = {"PATH": "/nowhere", "CXX": "", "LONGATTN_CACHE": str(Path(session.create_tmp()).resolve() / "none")}
    session.run(python, "-P", "tests/prebuilt_row.py", env=nowhere)


@nox.session
def choice(session: nox.Session) -> None:
    """Run attention's tests with rows chosen by expected time, as users' calls are; other sessions take the table's fixed order."""
    session.install(*constraints(session), *from_checkout("attention", "testing"), *group("test"))
    arguments = session.posargs or ["-m", "not slow"]
    session.run("pytest", *WORKERS, "packages/attention/tests", *arguments, env={"LONGATTN_CHOICE": "evidence"})


@nox.session
def ahead(session: nox.Session) -> None:
    """Compile every shipped Triton configuration for its architecture, without a GPU: shared memory, spills, registers, occupancy."""
    session.install(*constraints(session), *from_checkout("kernels", "testing,triton"), *group("test"))
    cache = Path(session.cache_dir).resolve() / "triton"  # kept between runs: what did not change is not compiled again
    session.env["TRITON_CACHE_DIR"] = str(cache)
    session.run("python", "-m", "tools.triton_ahead", *session.posargs)
    session.run("pytest", "tests/test_triton_ahead.py", env={"HYPOTHESIS_PROFILE": "nightly"})


@nox.session
def faults(session: nox.Session) -> None:
    """Ranks that are killed, raise, stop or are interrupted, at every step of every phase of every engine, on 2 to 4 processes; and ranks that differ."""
    session.install(*constraints(session), *from_checkout("attention"), *group("test"))
    tests = ["test_ring_faults.py", "test_ring_processes.py"]
    paths = [f"packages/attention/tests/{name}" for name in tests]
    session.run("pytest", "-n", "0", *paths, *session.posargs, env={"HYPOTHESIS_PROFILE": "nightly"})


@nox.session
def hosts(session: nox.Session) -> None:
    """Ranks on two, three and four network namespaces under torchrun, over links with delay, loss, reordering and a cut; skip with a reason where none can be made."""
    session.install(*constraints(session), *from_checkout("attention"), *group("test"))
    command = ("python", "-m", "tools.hosts")
    reason = session.run(*command, "--dry-run", silent=True, success_codes=[0, 77])
    if reason:
        session.skip(str(reason).strip())
    for count in ("2", "3", "4"):
        session.run(*command, "--hosts", count, *session.posargs)


@nox.session(name="soak-rings")
def soak_rings(session: nox.Session) -> None:
    """Two thousand calls over three processes, one in fifty with a fault, sampled rows against the oracle; `-- --steps 200` for fewer."""
    session.install(*constraints(session), *from_checkout("attention"), *group("test"))
    session.run("python", "packages/attention/tests/ring_soak.py", *session.posargs)
