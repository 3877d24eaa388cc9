"""Let `sgl.Engine(enable_multipole=True, multipole_config={...})` work.

Why: the engine passes its keyword arguments to `server_args_class`, which knows declared fields
only. The attribute is SGLang's own extension point, so nothing is patched.
Versions: 0.5.17.
Removed by: an upstream way for plugins to declare server arguments.
"""

from __future__ import annotations

import sys
from typing import Any

from sglang_multipole import arguments


def apply() -> None:
    """Put our factory in the place of ServerArgs.

    Does nothing in a process without the Engine: an Engine loads plugins when it is constructed, a
    command line long before, and importing the Engine takes seconds.
    """
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is not None:
        module.Engine.server_args_class = staticmethod(server_args_from_keywords)


def server_args_from_keywords(**keywords: Any) -> Any:
    """ServerArgs of an Engine's keyword arguments.

    Raises:
        ConfigError, RefusedError: as on the command line.
    """
    from sglang.srt.server_args import ServerArgs

    config = arguments.requested_config(keywords)
    for name in arguments.NAMES:
        keywords.pop(name, None)
    server_args = ServerArgs(**keywords)
    if config is not None:
        arguments.attach(server_args, config)
    return server_args
