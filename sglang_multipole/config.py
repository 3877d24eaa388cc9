"""The configuration: one frozen dataclass, parsed once, passed down whole."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from sglang_multipole import events_endpoint
from sglang_multipole.segment_size import segment_size_for
from sglang_multipole.suggestion import suggest

BACKEND_NAME = "multipole"
CLUSTERS_AT_ONCE = 16  # rows of a tensor core's product
_DEFAULT_MAX_TOKEN_BUDGET = 4096  # tokens


class ConfigError(ValueError):
    """The configuration cannot be used as given; the message says what to change."""


def _key(default: Any, help_text: str, unit: str, low: int | None = None, high: int | None = None):
    metadata = {"help": help_text, "unit": unit, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


def _choice(default: str, help_text: str, *choices: str):
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


def _by_batch_size(default: int, help_text: str, unit: str, low: int, high: int):
    metadata = {"help": help_text, "unit": unit, "low": low, "high": high, "is_by_batch_size": True}
    return dataclasses.field(default=default, metadata=metadata)


def _text(default: str, help_text: str):
    return dataclasses.field(default=default, metadata={"help": help_text, "is_text": True})


@dataclasses.dataclass(frozen=True)
class MultipoleConfig:
    """What an operator can set, with `--multipole-config '{"token_budget": 1024}'`."""

    token_budget: int = _key(
        512,
        "tokens each KV head attends to exactly per step, beside sinks and recent tokens",
        "tokens",
        0,
        1 << 20,
    )
    max_token_budget: int = _key(
        0,
        "the largest token_budget that a request may ask for; sizes the decode buffers; 0 chooses "
        "the larger of token_budget and 4096",
        "tokens",
        0,
        1 << 20,
    )
    min_context: int | dict[str, int] = _by_batch_size(
        4096,
        "requests shorter than this are attended exactly; they become sparse when they grow. One "
        "number, or numbers by batch size: a batch takes that of the largest size not above its "
        "own, or of the smallest there is",
        "tokens",
        0,
        1 << 24,
    )
    tokens_per_cluster: int = _key(16, "mean cluster size", "tokens", 2, 256)
    segment_size: int = _key(
        0,
        "tokens clustered together, 128 or more and a multiple of recluster_interval; 0 chooses by "
        "the model's RoPE base",
        "tokens",
        0,
        16384,
    )
    recluster_interval: int = _key(
        128,
        "generated tokens between two clusterings of the open segment; 1 to 2 times as many "
        "recent tokens are always exact",
        "tokens",
        16,
        16384,
    )
    num_sink_tokens: int = _key(10, "first tokens, always exact", "tokens", 0, 128)
    num_lloyd_iters: int = _key(4, "Lloyd iterations of a clustering", "iterations", 0, 64)
    max_cluster_size_ratio: int = _key(
        8, "largest cluster, in multiples of tokens_per_cluster", "ratio", 2, 64
    )
    max_logit_variance: float = _key(
        2.0,
        "cap of a cluster's logit variance in the second-order weight of its centroid; "
        "0 switches the correction off",
        "nats squared",
        0,
        16,
    )
    centroid_dtype: str = _choice(
        "int8",
        "how centroids are stored: in 8 bits with a scale each, or in the KV pool's dtype (auto)",
        "int8",
        "fp8_e4m3",
        "auto",
    )
    max_builds_per_step: int = _key(
        8,
        "segments clustered between two decode steps, unless strict_activation",
        "segments",
        1,
        1 << 20,
    )
    pool_headroom: int = _key(
        0,
        "places of the cluster pool beyond one per segment of the KV pool, for open segments; "
        "0 chooses a sixteenth as many, at least 8",
        "segments",
        0,
        1 << 20,
    )
    strict_activation: bool = _key(
        False,
        "a segment becomes sparse at a position given by token counts alone, and the step waits "
        "for it: answers do not depend on load",
        "",
    )
    check_integrity: bool = _key(
        False,
        "at every flush of the cache, compare the cluster pool with its invariants and stop the "
        "server if one is broken; for tests, it takes seconds",
        "",
    )
    dense_backend: str = _choice(
        "auto",
        "SGLang's attention backend for prefill and for batches without clusters; tested on GPUs: "
        "flashinfer and triton",
        "auto",
        "flashinfer",
        "triton",
        "fa3",
        "torch_native",
    )

    events_endpoint: str = _text(
        "",
        "address at which each scheduler publishes events, tcp:// or ipc://; none if empty; "
        "see docs/events.md",
    )
    events_allow_remote: bool = _key(
        False, "let events_endpoint be an address that other machines can reach", ""
    )
    events_interval_ms: int = _key(
        250, "at least so much time lies between two step events", "milliseconds", 10, 60000
    )

    audit_interval: int = _key(
        0,
        "every so many decode steps one sparse request is attended to densely as well, in one "
        "layer, behind the step; error and covered mass go to metrics and events; 0 switches the "
        "audit off",
        "decode steps",
        0,
        1 << 20,
    )
    audit_layer: int = _key(
        -1, "the audited layer, from 0; -1 is the middle one", "layers", -1, 1 << 10
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.events_endpoint:
            try:
                events_endpoint.check(self.events_endpoint, self.events_allow_remote)
            except ValueError as error:
                raise ConfigError(f"events_endpoint {error}") from error
        if self.token_budget > self.token_budget_limit:
            raise ConfigError(
                f"token_budget ({self.token_budget} tokens) must be at most max_token_budget "
                f"({self.max_token_budget} tokens); raise max_token_budget, or leave it out"
            )
        if self.strict_activation and isinstance(self.min_context, dict):
            raise ConfigError(
                "strict_activation makes answers independent of load, and min_context by batch "
                "size makes them depend on it; give min_context as one number of tokens"
            )
        if 0 < self.segment_size < 128:
            raise ConfigError(
                "segment_size must be 128 to 16384 tokens, or 0 to have it chosen by the model's "
                f"RoPE base, got {self.segment_size}"
            )
        if self.segment_size % self.recluster_interval:
            raise ConfigError(
                f"segment_size ({self.segment_size} tokens) must be a multiple of "
                f"recluster_interval ({self.recluster_interval} tokens)"
            )
        if self.clusters_per_segment % CLUSTERS_AT_ONCE:
            raise ConfigError(
                f"segment_size ({self.segment_size} tokens) must be a multiple of "
                f"{CLUSTERS_AT_ONCE} tokens_per_cluster "
                f"({CLUSTERS_AT_ONCE * self.tokens_per_cluster} tokens): the kernels multiply "
                f"{CLUSTERS_AT_ONCE} centroids at a time"
            )
        if self.recluster_interval % self.tokens_per_cluster:
            raise ConfigError(
                f"recluster_interval ({self.recluster_interval} tokens) must be a multiple of "
                f"tokens_per_cluster ({self.tokens_per_cluster} tokens)"
            )
        if self.num_sink_tokens >= self.recluster_interval:
            raise ConfigError(
                f"num_sink_tokens ({self.num_sink_tokens} tokens) must be less than "
                f"recluster_interval ({self.recluster_interval} tokens)"
            )

    def for_model(self, rope_base: float) -> MultipoleConfig:
        """The configuration with nothing left to be chosen by the model.

        Args:
            rope_base: rope_theta in the model's configuration.

        Raises:
            ConfigError: the segment size that the model chooses does not go with another key.
        """
        if self.segment_size:
            return self
        return dataclasses.replace(self, segment_size=segment_size_for(rope_base))

    @property
    def max_cluster_size(self) -> int:
        """Tokens in the largest cluster."""
        return self.tokens_per_cluster * self.max_cluster_size_ratio

    @property
    def token_budget_limit(self) -> int:
        """The largest budget a request can have, in tokens: max_token_budget, or what 0 chooses."""
        return self.max_token_budget or max(self.token_budget, _DEFAULT_MAX_TOKEN_BUDGET)

    @property
    def clusters_per_segment(self) -> int:
        return self.segment_size // self.tokens_per_cluster

    def min_context_of(self, num_rows: int) -> int:
        """The gate of a batch of num_rows rows, in tokens."""
        if isinstance(self.min_context, int):
            return self.min_context
        sizes = sorted(map(int, self.min_context))
        reached = [size for size in sizes if size <= num_rows]
        return self.min_context[str(reached[-1] if reached else sizes[0])]

    @property
    def min_context_text(self) -> str:
        """The gate as a log line or a report says it."""
        if isinstance(self.min_context, int):
            return f"{self.min_context} tokens"
        sizes = sorted(self.min_context, key=int)
        return ", ".join(f"{self.min_context[size]} tokens from batch {size}" for size in sizes)

    def clustered_tokens(self, seq_len: int, num_rows: int = 1) -> int:
        """Tokens under clusters at a decode step whose row is seq_len long, its own token included.

        A function of the length and of the batch's gate; [1, 2) recluster intervals stay exact
        behind it.
        """
        if seq_len < self.min_context_of(num_rows):
            return 0
        return max(seq_len // self.recluster_interval - 1, 0) * self.recluster_interval

    def to_dict(self) -> dict[str, Any]:
        """Plain builtins, so that it travels to every process inside SGLang's ServerArgs."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MultipoleConfig:
        """Build from plain values.

        Raises:
            ConfigError: an unknown key (the nearest valid one is named), or a value of the wrong
                type or out of its limits (type, limits and unit are named).
        """
        if not isinstance(values, dict):
            raise ConfigError(
                f"the multipole config must be a JSON object, got {type(values).__name__}; "
                "example: '{\"token_budget\": 1024}'"
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in the multipole config; {suggest(str(key), known)}"
                )
        return cls(**values)

    @classmethod
    def parse(cls, text: str | dict[str, Any] | None) -> MultipoleConfig:
        """Build from a JSON text, from `@file` naming one, from a dict, or the defaults from None.

        Raises:
            ConfigError: the file cannot be read, the text is no JSON, or see from_dict.
        """
        if text is None:
            return cls()
        if isinstance(text, dict):
            return cls.from_dict(text)
        where = "--multipole-config"
        if text.startswith("@"):
            path = Path(text[1:])
            where = str(path)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--multipole-config: cannot read {path}: {error}") from error
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{where} is not valid JSON ({error}); "
                "example: --multipole-config '{\"token_budget\": 1024}'"
            ) from error
        return cls.from_dict(values)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in the field's own type, or a ConfigError naming type, limits and unit."""
    choices = field.metadata.get("choices")
    if choices is not None:
        if value not in choices:
            raise ConfigError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        return value
    if field.metadata.get("is_text"):
        if not isinstance(value, str):
            raise ConfigError(f"{field.name} must be a text, got {value!r}")
        return value
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{field.name} must be true or false, got {value!r}")
        return value
    if field.metadata.get("is_by_batch_size") and isinstance(value, dict):
        return _checked_by_batch_size(field, value)
    return _checked_number(field, field.name, value)


def _checked_number(field: dataclasses.Field, name: str, value: Any) -> int | float:
    is_float = isinstance(field.default, float)
    low, high, unit = (field.metadata[key] for key in ("low", "high", "unit"))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    in_limits = is_number and low <= value <= high
    if not in_limits or (not is_float and value % 1):
        kind = "a number" if is_float else "a whole number"
        raise ConfigError(f"{name} must be {kind} of {unit}, {low} to {high}, got {value!r}")
    return float(value) if is_float else int(value)


def _checked_by_batch_size(field: dataclasses.Field, table: dict[Any, Any]) -> dict[str, int]:
    sizes = [str(size) for size in table]
    if not sizes or not all(re.fullmatch("[1-9][0-9]{0,5}", size) for size in sizes):
        raise ConfigError(
            f"{field.name} by batch size must have batch sizes from 1 to 999999 as keys, got "
            f'{table!r}; example: {{"1": 32768, "8": 8192}}'
        )
    return {
        size: _checked_number(field, f"{field.name}[{size!r}]", number)
        for size, number in zip(sizes, table.values(), strict=True)
    }
