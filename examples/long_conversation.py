"""Several turns about one long document: each turn finds the clusters of the turns before.

Every request holds the whole conversation so far. SGLang's radix cache finds its KV, and with it
the clusters of its sealed segments, so that a turn clusters only what is new. In SGLang's frontend
language.

    sglang-multipole serve <model> --enable-multipole ... &
    python examples/long_conversation.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import activity
import document
import sglang as sgl

QUESTIONS = (
    "In one sentence: what is this text about?",
    "Which statement does it explain first?",
    "What would you read next?",
)
MAX_TOKENS = 48
CHAT_TEMPLATE = "chatml"  # of the demo's model


@sgl.function
def conversation(
    s: sgl.lang.interpreter.ProgramState, text: str, questions: tuple[str, ...]
) -> None:
    """Ask one question after the other, the document before the first."""
    for turn, question in enumerate(questions):
        s += sgl.user(f"{text}\n\n{question}" if turn == 0 else question)
        s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=MAX_TOKENS, temperature=0))


def run(url: str, text: str, questions: tuple[str, ...] = QUESTIONS) -> list[dict[str, Any]]:
    """Talk about `text`; one dictionary a turn: question, answer, prompt_tokens, activity."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name=CHAT_TEMPLATE)
    state = conversation.run(text, questions, backend=backend)
    if state.error() is not None:
        raise RuntimeError(f"long_conversation: the program failed on {url}") from state.error()
    turns = []
    for turn, question in enumerate(questions):
        meta_info = state.get_meta_info(f"answer{turn}")
        turns.append(
            {
                "question": question,
                "answer": state[f"answer{turn}"].strip(),
                "prompt_tokens": meta_info["prompt_tokens"],
                "cached_tokens": meta_info["cached_tokens"],
                "activity": meta_info.get("multipole"),
            }
        )
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, help="a text, in place of the Python reference")
    arguments = parser.parse_args()
    for turn in run(arguments.url, document.read(arguments.document)):
        print(f"\n{turn['question']}\n  {turn['answer']}")
        print(f"  {turn['cached_tokens']} of {turn['prompt_tokens']} prompt tokens were cached")
        print(f"  {activity.describe(turn['activity'])}")


if __name__ == "__main__":
    main()
