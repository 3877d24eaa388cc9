"""Self-consistency: sample several chains of thought about one document, and let them vote.

The document is prefilled and clustered once; every chain attends to it sparsely. In SGLang's
frontend language.

    sglang-multipole serve <model> --enable-multipole ... &
    python examples/self_consistency.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import collections
import re
from pathlib import Path
from typing import Any

import activity
import document
import sglang as sgl

QUESTION = (
    "How many clauses of a try statement does the text name? Think in one sentence, then write "
    '"The answer is" and the number.'
)
NUM_CHAINS = 5
MAX_TOKENS = 64
TEMPERATURE = 0.7
CHAT_TEMPLATE = "chatml"  # of the demo's model
_WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}


@sgl.function
def chains(s: sgl.lang.interpreter.ProgramState, prompt: str, num_chains: int) -> None:
    """Sample num_chains answers to `prompt`."""
    s += sgl.user(prompt)
    s.sync()  # the prompt is prefilled before the fork, once
    forks = s.fork(num_chains)
    for fork in forks:
        fork += sgl.assistant(sgl.gen("chain", max_tokens=MAX_TOKENS, temperature=TEMPERATURE))
    s["chains"] = [fork["chain"].strip() for fork in forks]
    s["activity"] = [fork.get_meta_info("chain").get("multipole") for fork in forks]


def read_answer(chain: str) -> str | None:
    """The last number of a chain, in digits; None if it has none."""
    numbers = re.findall(r"\d+|" + "|".join(_WORDS), chain.lower())
    return _WORDS.get(numbers[-1], numbers[-1]) if numbers else None


def vote(answers: list[str | None]) -> tuple[str | None, int]:
    """The most frequent answer and its votes; the first of equals. Chains without one abstain."""
    counts = collections.Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0] if counts else (None, 0)


def run(url: str, text: str, num_chains: int = NUM_CHAINS) -> dict[str, Any]:
    """Ask about `text`: chains, activity (one each), answers, winner and votes."""
    backend = sgl.RuntimeEndpoint(url, chat_template_name=CHAT_TEMPLATE)
    state = chains.run(f"{text}\n\n{QUESTION}", num_chains, backend=backend)
    if state.error() is not None:
        raise RuntimeError(f"self_consistency: the program failed on {url}") from state.error()
    answers = [read_answer(chain) for chain in state["chains"]]
    winner, votes = vote(answers)
    found = {"answers": answers, "winner": winner, "votes": votes}
    return {"chains": state["chains"], "activity": state["activity"]} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, help="a text, in place of the Python reference")
    parser.add_argument("--num-chains", type=int, default=NUM_CHAINS)
    arguments = parser.parse_args()
    result = run(arguments.url, document.read(arguments.document), arguments.num_chains)
    for chain, answer, counters in zip(
        result["chains"], result["answers"], result["activity"], strict=True
    ):
        print(f"\n{chain}\n  -> {answer}\n  {activity.describe(counters)}")
    print(f"\n{result['winner']} has {result['votes']} of {arguments.num_chains} votes.")


if __name__ == "__main__":
    main()
