"""Reads what the user gave on SGLang's command line, before SGLang is imported.

SGLang's own parser costs ten seconds of imports; the port and the presence of a few flags are
needed earlier. Nothing is validated here: that stays with SGLang's parser.
"""

from __future__ import annotations

from pathlib import Path

import yaml


def read_given(argv: list[str]) -> dict[str, str]:
    """Map each argument the user gave to its value; names as in Python (`max_total_tokens`).

    Understands `--name value`, `--name=value`, switches (value ""), the positional model and the
    keys of the YAML file after `--config`, which the command line overrides as in SGLang.
    """
    given: dict[str, str] = {}
    name = "model_path"
    for argument in argv:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = flag.replace("-", "_")
            given[name] = value
            if equals:
                name = ""
        elif name:
            given[name] = argument
            name = ""
    return {**_read_config(given.get("config")), **given}


def _read_config(path: str | None) -> dict[str, str]:
    try:
        content = yaml.safe_load(Path(path).read_text()) if path else {}
    except (OSError, yaml.YAMLError):
        return {}  # SGLang reads the file again and reports what is wrong with it
    if not isinstance(content, dict):
        return {}
    return {str(key).replace("-", "_"): str(value) for key, value in content.items()}
