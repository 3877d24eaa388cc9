"""Each hook is in place after SGLang has loaded the plugin, and a missing one stops the server."""

from __future__ import annotations

import pkgutil

import pytest

import multipole_patches
from multipole_patches import ARGUMENT_PATCHES, SCHEDULER_PATCHES, TOKENIZER_PATCHES
from sglang_multipole import sglang_compat

ALL = (*ARGUMENT_PATCHES, *TOKENIZER_PATCHES, *SCHEDULER_PATCHES)


@pytest.fixture
def hook_registry():
    """SGLang's hook registry, empty; every target is put back afterwards."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.reset()
    owners = [pkgutil.resolve_name(patch.TARGET.rpartition(".")[0]) for patch in ALL]
    names = [patch.TARGET.rpartition(".")[2] for patch in ALL]
    before = [owner.__dict__[name] for owner, name in zip(owners, names, strict=True)]
    yield HookRegistry
    for owner, name, value in zip(owners, names, before, strict=True):
        setattr(owner, name, value)
    HookRegistry.reset()


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.__name__.rpartition(".")[2])
def test_a_patch_says_why_for_which_version_and_until_when(patch):
    for section in ("Why:", "Versions:", "Removed by:"):
        assert section in patch.__doc__
    for version in sglang_compat.TESTED_VERSIONS:
        assert version in patch.__doc__


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.__name__.rpartition(".")[2])
def test_a_patch_is_not_there_before_and_there_after(patch, hook_registry):
    before = pkgutil.resolve_name(patch.TARGET)
    assert not hasattr(before, "__wrapped__") or "multipole" not in before.__module__
    multipole_patches.apply_now((patch,))
    assert pkgutil.resolve_name(patch.TARGET) != before
    assert patch.TARGET in sglang_compat.applied_hooks()


def test_a_hook_that_does_not_apply_stops_the_server(hook_registry, monkeypatch):
    """SGLang only logs that a target is gone; the backend's factory must not go on."""
    patch = SCHEDULER_PATCHES[0]
    monkeypatch.setattr(patch, "TARGET", "sglang.srt.managers.scheduler.Scheduler.renamed")
    multipole_patches.register(SCHEDULER_PATCHES)
    hook_registry.apply_hooks()
    with pytest.raises(RuntimeError, match=r"hooks on .*Scheduler.renamed are not applied.*0.5.17"):
        multipole_patches.verify_applied(SCHEDULER_PATCHES)


def test_the_flag_is_not_offered_when_it_could_not_be_honoured(hook_registry):
    import argparse

    from multipole_patches import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args.hook(None, parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--enable-multipole"])


def test_the_scheduler_is_recognised_by_its_main_function():
    from sglang_multipole import plugin

    def run_scheduler_process():
        return plugin._is_scheduler_process()

    assert run_scheduler_process()
    assert not plugin._is_scheduler_process()
