"""A batch job over `sgl.Engine`: one long document, several questions, clusters shared.

python examples/offline_batch.py --model-path <folder>
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

from sglang_multipole import cpu_host

QUESTIONS = (
    "In one sentence, what does an assertion do?",
    "In one sentence, what is an assignment?",
    "In one sentence, what is an attribute?",
)
DOCUMENT_CHARACTERS = 10500  # about 2,450 tokens: a sealed segment and a part of the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()
    # before SGLang is imported; does nothing where there is a CUDA driver
    cpu_host.prepare()
    import sglang as sgl

    engine = sgl.Engine(
        model_path=arguments.model_path,
        enable_multipole=True,
        multipole_config={"token_budget": 256, "min_context": 1024},
        **cpu_host.engine_arguments(),
    )
    try:
        document = " ".join(topics[name] for name in sorted(topics))[:DOCUMENT_CHARACTERS]
        sampling = {"temperature": 0, "max_new_tokens": arguments.max_new_tokens}
        for question in QUESTIONS:
            answer = engine.generate(f"{document}\n\nQuestion: {question}\nAnswer:", sampling)
            print(f"{question}\n  {answer['text'].strip()}\n  {answer['meta_info']['multipole']}")
    finally:
        engine.shutdown()


# SGLang's processes are spawned: they import this file again
if __name__ == "__main__":
    main()
