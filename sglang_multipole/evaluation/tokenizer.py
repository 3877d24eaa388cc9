"""The tokenizer of the server's model, so that a prompt's length is what the server will count."""

from __future__ import annotations

from typing import Any

from sglang_multipole.evaluation.task import Prompt


class ModelTokenizer:
    """Encodes prompts as the server does: within its chat template, or as text to be completed."""

    def __init__(self, path: str, *, chat: bool, template_kwargs: dict[str, Any] | None = None):
        """
        Args:
            path: folder or Hugging Face name.
            chat: whether prompts are put into the chat template.
            template_kwargs: for the template, for example {"enable_thinking": False}.

        Raises:
            ValueError: there is no tokenizer, or none with a chat template.
        """
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(path)
        except ImportError as error:
            raise ValueError(
                "eval: the package transformers must be installed to count tokens, got "
                f"{error}; pip install 'sglang-multipole[sglang]'"
            ) from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"eval: --tokenizer must be a model's folder or name, got {path!r} ({reason}); "
                "give the one whose tokenizer the server uses"
            ) from error
        if chat and not self._tokenizer.chat_template:
            raise ValueError(
                f"eval: the tokenizer must have a chat template, got none in {path!r}; "
                "give --api completions"
            )
        self.path = path
        self._chat = chat
        self._template_kwargs = template_kwargs or {}

    def encode(self, prompt: Prompt) -> list[int]:
        """See task.Tokenizer."""
        if not self._chat:
            return self._tokenizer.encode(prompt.text + prompt.answer_prefix)
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            tokenize=False,
            add_generation_prompt=True,
            **self._template_kwargs,
        )
        return self._tokenizer.encode(text, add_special_tokens=False)
