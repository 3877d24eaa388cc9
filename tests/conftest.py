"""What all tests share."""

from __future__ import annotations

from sglang_multipole import cpu_host

pytest_plugins = ["tests.server_fixture"]

# before any test imports SGLang
cpu_host.prepare()
