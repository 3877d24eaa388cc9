"""The demo: best of N on a multipole server, and its greedy answer against a dense twin's.

Starts the servers itself, one after the other, and leaves none behind.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import activity
import best_of_n
from sglang.lang.chat_template import get_chat_template

from sglang_multipole import cpu_host, demo_model
from sglang_multipole.local_server import LocalServer

MULTIPOLE_FLAGS = [
    "--enable-multipole",
    '--multipole-config={"token_budget": 256, "min_context": 2048}',
]
COMMON_FLAGS = ["--max-total-tokens=16384", "--random-seed=1"]
if cpu_host.is_needed():
    # a CPU has computed a step when it has launched it: overlapped, a first token would wait for
    # the next step, in which the prompt is clustered
    COMMON_FLAGS.append("--disable-overlap-schedule")
NUM_GREEDY_TOKENS = 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, help="instead of the demo's model")
    parser.add_argument("--dense-only", action="store_true", help="leave multipole attention off")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        model_path = arguments.model_path or demo_model.make(demo_model.default_folder())
        with tempfile.TemporaryDirectory(prefix="sglang-multipole-demo-") as folder:
            run(model_path, [] if arguments.dense_only else MULTIPOLE_FLAGS, Path(folder))
    except KeyboardInterrupt:
        print("\ndemo: stopped, no server is left running", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"\ndemo: failed, no server is left running\n{error}", file=sys.stderr)
        return 1
    return 0


def run(model_path: Path, flags: list[str], folder: Path) -> None:
    """Show the multipole server's answers, then where a dense one would have answered otherwise."""
    began = time.monotonic()
    _say(f"starting the server with {' '.join(flags) or 'dense attention'}", began)
    with LocalServer(model_path, COMMON_FLAGS + flags, folder / "multipole.log") as server:
        _say(f"best of {best_of_n.NUM_SAMPLES} on {server.base_url}", began)
        best_of_n.show(best_of_n.run(server.base_url))
        print()
        _say("greedy answer to the same prompt", began)
        sparse = ask_greedy(server)
    _say("starting the dense twin", began)
    with LocalServer(model_path, COMMON_FLAGS, folder / "dense.log") as server:
        _say("its greedy answer to the same prompt", began)
        dense = ask_greedy(server)

    counters = activity.describe(sparse["meta_info"].get("multipole"))
    print(f"\nGreedy, first server\n  {sparse['text'].strip()}\n  {counters}")
    print(f"\nGreedy, dense twin\n  {dense['text'].strip()}")
    position = find_difference(sparse["output_ids"], dense["output_ids"])
    if position is None:
        print(f"\nAll {len(dense['output_ids'])} tokens agree.\n")
    else:
        print(f"\nThe two first differ at token {position} of {len(dense['output_ids'])}.\n")
    _say("done", began)


def best_of_n_text() -> str:
    """The text that best_of_n's samples continue: its messages in the chat template."""
    template = get_chat_template(best_of_n.CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": best_of_n.SYSTEM},
        {"role": "user", "content": best_of_n.build_prompt()},
    ]
    prefix, _ = template.get_prefix_and_suffix("assistant", messages)
    return template.get_prompt(messages) + prefix


def ask_greedy(server: LocalServer) -> dict[str, Any]:
    """The most probable answer to best_of_n's prompt, as /generate returns it."""
    stop = list(get_chat_template(best_of_n.CHAT_TEMPLATE).stop_str)
    sampling = {"temperature": 0, "max_new_tokens": NUM_GREEDY_TOKENS, "stop": stop}
    return server.post("/generate", {"text": best_of_n_text(), "sampling_params": sampling})


def find_difference(first: list[int], second: list[int]) -> int | None:
    """The first position, from 0, where two token sequences differ; None if they are equal."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return None if len(first) == len(second) else min(len(first), len(second))


def _say(message: str, began: float) -> None:
    print(f"[{time.monotonic() - began:5.0f} s] {message}", flush=True)


def _stop(signum: int, frame: object) -> None:
    # as Ctrl-C: the `with` blocks stop what they started
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
