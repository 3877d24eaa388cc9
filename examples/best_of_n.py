"""Best of N over one long document, in SGLang's frontend language.

The document is prefilled once; N answers are sampled from it in parallel (fork), and the model then
chooses one of them. Every sample and the choice attend to the same document: with multipole
attention its clusters are built once.

    sglang-multipole serve <model> --enable-multipole ... &
    python examples/best_of_n.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from typing import Any

import activity
import document
import sglang as sgl

SYSTEM = "You are a helpful assistant. Answer from the given text, in one or two sentences."
QUESTION = "According to the text: when does the else clause of a try statement run?"
NUM_SAMPLES = 4
MAX_ANSWER_TOKENS = 48
TEMPERATURE = 0.4  # a model this small loses the thread above
CHAT_TEMPLATE = "chatml"  # of the demo's model


def build_prompt() -> str:
    """The document with the question behind it."""
    return f"{document.read(None)}\n\n{QUESTION}"


@sgl.function
def best_of_n(s: sgl.lang.interpreter.ProgramState, prompt: str, num_samples: int) -> None:
    """Sample num_samples answers to `prompt`, then let the model choose one."""
    s += sgl.system(SYSTEM)
    s += sgl.user(prompt)
    s.sync()  # or fork may come before the text, and would not have it prefilled for all samples
    samples = s.fork(num_samples)
    for sample in samples:
        sample += sgl.assistant(
            sgl.gen("answer", max_tokens=MAX_ANSWER_TOKENS, temperature=TEMPERATURE)
        )
    s["answers"] = [sample["answer"].strip() for sample in samples]
    s["activity"] = [sample.get_meta_info("answer").get("multipole") for sample in samples]
    s["prompt_tokens"] = samples[0].get_meta_info("answer")["prompt_tokens"]

    numbered = [f"Answer {i}: {answer}" for i, answer in enumerate(s["answers"], start=1)]
    s += sgl.assistant("\n".join(numbered))
    s += sgl.user("Which of these answers agrees best with the text?")
    numbers = [str(i) for i in range(1, num_samples + 1)]
    s += sgl.assistant("Answer " + sgl.gen("choice", choices=numbers))


def run(url: str, num_samples: int = NUM_SAMPLES) -> dict[str, Any]:
    """Run the program on the server at `url`.

    Returns:
        answers, activity (one dictionary or None each), prompt_tokens and choice (from 0).
    """
    backend = sgl.RuntimeEndpoint(url, chat_template_name=CHAT_TEMPLATE)
    state = best_of_n.run(build_prompt(), num_samples, backend=backend)
    if state.error() is not None:
        raise RuntimeError(f"best_of_n: the program failed on {url}") from state.error()
    names = ("answers", "activity", "prompt_tokens")
    return {name: state[name] for name in names} | {"choice": int(state["choice"]) - 1}


def show(result: dict[str, Any]) -> None:
    """Print the answers, the choice and what the attention code counted."""
    print(f"\nQuestion, behind {result['prompt_tokens']} tokens of shared prompt:\n  {QUESTION}")
    for i, (answer, counters) in enumerate(
        zip(result["answers"], result["activity"], strict=True), start=1
    ):
        chosen = "  <- chosen" if i - 1 == result["choice"] else ""
        print(f"\nAnswer {i}{chosen}\n  {answer}")
        print(f"  {activity.describe(counters)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--num-samples", type=int, default=NUM_SAMPLES)
    arguments = parser.parse_args()
    show(run(arguments.url, arguments.num_samples))
