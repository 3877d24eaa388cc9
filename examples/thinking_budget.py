"""A budget of thinking tokens: think so long and no longer, then answer.

The thinking is one generation that ends at `</think>` or at the budget; the answer continues from
there, and finds the KV and the clusters of the thinking in the cache. It works with any model and
needs no flag of the server. In SGLang's frontend language.

    sglang-multipole serve <model> --enable-multipole ... &
    python examples/thinking_budget.py --url http://127.0.0.1:30000 --budget 256
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import activity
import document
import sglang as sgl

QUESTION = "According to the text, what happens when an exception is not handled?"
BUDGET = 128  # tokens
MAX_ANSWER_TOKENS = 64
CHAT_TEMPLATE = "chatml"  # of the demo's model


@sgl.function
def think_and_answer(s: sgl.lang.interpreter.ProgramState, prompt: str, budget: int) -> None:
    """Think for at most `budget` tokens about `prompt`, then answer."""
    s += sgl.user(prompt)
    s += sgl.assistant_begin()
    s += "<think>\n"
    s += sgl.gen("thinking", max_tokens=budget, temperature=0, stop="</think>")
    s += "\n</think>\n\n"
    s += sgl.gen("answer", max_tokens=MAX_ANSWER_TOKENS, temperature=0)
    s += sgl.assistant_end()


def run(url: str, text: str, budget: int = BUDGET) -> dict[str, dict[str, Any]]:
    """Ask about `text`: for thinking and answer their text, tokens and activity."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name=CHAT_TEMPLATE)
    state = think_and_answer.run(f"{text}\n\n{QUESTION}", budget, backend=backend)
    if state.error() is not None:
        raise RuntimeError(f"thinking_budget: the program failed on {url}") from state.error()
    parts = {}
    for name in ("thinking", "answer"):
        meta_info = state.get_meta_info(name)
        parts[name] = {
            "text": state[name].strip(),
            "tokens": meta_info["completion_tokens"],
            "cached_tokens": meta_info["cached_tokens"],
            "prompt_tokens": meta_info["prompt_tokens"],
            "activity": meta_info.get("multipole"),
        }
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, help="a text, in place of the Python reference")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens of thinking")
    arguments = parser.parse_args()
    parts = run(arguments.url, document.read(arguments.document), arguments.budget)
    for name, part in parts.items():
        print(f"\n{name}, {part['tokens']} tokens\n  {part['text']}")
        print(f"  {activity.describe(part['activity'])}")


if __name__ == "__main__":
    main()
