"""Packaging: the wheel and the editable install hold all packages and shadow nobody's."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sglang_multipole", "multipole_kernels", "multipole_patches")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that no build folder appears among them."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("the sources are no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [sys.executable, *build, "--wheel-dir", str(folder), str(sources)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("sglang_multipole-*.whl")))


def test_the_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = [ROOT / "sglang_multipole", *ROOT.glob("kernels/*/"), *ROOT.glob("patches/*/")]
    expected = {
        str(path.relative_to(source.parent))
        for source in sources
        for pattern in ("*.py", "*.cu", "*.cuh")
        for path in source.rglob(pattern)
    }
    assert len(expected) > len(PACKAGES)
    assert expected <= names
    # each package has its own metadata folder beside it, and nothing else is at the top
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(PACKAGES)


def test_the_wheel_registers_the_plugin_and_the_command(wheel: zipfile.ZipFile) -> None:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["sglang.srt.plugins"]) == {"multipole": "sglang_multipole.plugin:register"}
    assert dict(entries["console_scripts"]) == {"sglang-multipole": "sglang_multipole.cli:main"}


def test_the_installed_package_registers_the_plugin() -> None:
    try:
        distribution = importlib.metadata.distribution("sglang-multipole")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sglang-multipole is not installed here")
    groups = {entry.group for entry in distribution.entry_points}
    assert {"sglang.srt.plugins", "console_scripts"} <= groups


def test_kernels_is_still_hugging_faces_package() -> None:
    """A top-level kernels/__init__.py would shadow it, and SGLang would change its dense kernels.

    Run from the root, the worst place: there the folder `kernels` is beside the interpreter's path.
    """
    code = "import kernels; print(kernels.__file__); from kernels import get_kernel"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "kernels")


@pytest.mark.parametrize("folder", ["kernels", "patches"])
def test_container_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
