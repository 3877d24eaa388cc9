"""What multipole attention cannot be combined with, and the recipe that works instead.

Each rule names a feature, tells whether it is on, and says what to do. The documentation's support
matrix is made from the same list. Rules on the server's arguments and the model's configuration run
in the launcher, before anything heavy starts; rules on the model's layers and pools run in the
scheduler, once they exist.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch

from sglang_multipole import sglang_compat
from sglang_multipole.config import BACKEND_NAME, MultipoleConfig

SUPPORTED_ROTARY = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
SUPPORTED_HEAD_DIMS = (64, 96, 128, 256)  # on a GPU
MAX_GQA_GROUP_SIZE = 16  # on a GPU
SUPPORTED_KV_POOL = "MHATokenToKVPool"
SUPPORTED_ALLOCATORS = ("TokenToKVPoolAllocator", "PagedTokenToKVPoolAllocator")


class RefusedError(ValueError):
    """Multipole attention was asked for and cannot be had; the message has the recipe."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    feature: str
    is_on: Callable[[Any], bool]
    recipe: str


def _flag(name: str, off: Any = False) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name, off) not in (off, None)


def _env(name: str) -> Callable[[Any], bool]:
    return lambda _: os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


ARGUMENTS = (
    Refusal(
        "speculative decoding",
        _flag("speculative_algorithm", None),
        "leave out --speculative-algorithm",
    ),
    Refusal("pipeline parallelism", _flag("pp_size", 1), "use --tp-size in place of --pp-size"),
    Refusal(
        "deterministic inference",
        _flag("enable_deterministic_inference"),
        "leave out --enable-deterministic-inference; strict_activation makes answers independent "
        "of load up to rounding",
    ),
    Refusal(
        "on-policy RL rollouts",
        _flag("rl_on_policy_target", None),
        "leave out --rl-on-policy-target: sparse attention changes the log-probabilities",
    ),
    Refusal(
        "unified memory pool", _flag("enable_unified_memory"), "leave out --enable-unified-memory"
    ),
    Refusal(
        "hierarchical cache",
        _flag("enable_hierarchical_cache"),
        "leave out --enable-hierarchical-cache",
    ),
    Refusal("LMCache", _flag("enable_lmcache"), "leave out --enable-lmcache"),
    Refusal("HiSparse", _flag("enable_hisparse"), "leave out --enable-hisparse"),
    Refusal(
        "prefill/decode disaggregation",
        _flag("disaggregation_mode", "null"),
        "serve prefill and decode in one server",
    ),
    Refusal(
        "two-batch overlap",
        _flag("enable_two_batch_overlap"),
        "leave out --enable-two-batch-overlap",
    ),
    Refusal("PD multiplexing", _flag("enable_pdmux"), "leave out --enable-pdmux"),
    Refusal(
        "DP attention", _flag("enable_dp_attention"), "use --dp-size without --enable-dp-attention"
    ),
    Refusal(
        "decode context parallelism", _flag("dcp_size", 1), "use --tp-size in place of --dcp-size"
    ),
    Refusal("attention context parallelism", _flag("attn_cp_size", 1), "leave out --attn-cp-size"),
    Refusal(
        "diffusion language models", _flag("dllm_algorithm", None), "leave out --dllm-algorithm"
    ),
    Refusal(
        "several tokenizer processes",
        _flag("tokenizer_worker_num", 1),
        "leave out --tokenizer-worker-num: SGLang loads no plugins in them",
    ),
    Refusal("torch.compile", _flag("enable_torch_compile"), "leave out --enable-torch-compile"),
    Refusal(
        "elastic expert parallelism",
        _flag("elastic_ep_backend", None),
        "leave out --elastic-ep-backend",
    ),
    Refusal(
        "a quantised KV cache",
        lambda args: getattr(args, "kv_cache_dtype", "auto") not in ("auto", "bf16", "bfloat16"),
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        "another decode backend",
        lambda args: getattr(args, "decode_attention_backend", BACKEND_NAME) != BACKEND_NAME,
        "leave out --decode-attention-backend; choose the prefill backend with "
        "--prefill-attention-backend",
    ),
    Refusal(
        "pages above 1 on a CPU",
        lambda args: getattr(args, "device", None) == "cpu" and _flag("page_size", 1)(args),
        "use --page-size 1: SGLang's paged KV allocator is a kernel for GPUs",
    ),
    Refusal("HND KV layout", _env("SGLANG_USE_HND_KVCACHE"), "unset SGLANG_USE_HND_KVCACHE"),
    Refusal(
        "KV sizing after graph capture",
        _env("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        "unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    ),
    Refusal("the Rust server", _env("SGLANG_RUST_SERVER"), "unset SGLANG_RUST_SERVER"),
)

_DENSE = "serve this model without --enable-multipole"


def _is_mla(model_config: Any) -> bool:
    return getattr(model_config.attention_arch, "name", "") == "MLA"


def _has_state_space_layers(model_config: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model_config) is not None


MODELS = (
    Refusal("multi-head latent attention (MLA)", _is_mla, _DENSE),
    Refusal("sliding-window layers", lambda m: bool(getattr(m, "is_hybrid_swa", False)), _DENSE),
    Refusal("an encoder-decoder", lambda m: bool(m.is_encoder_decoder), _DENSE),
    Refusal("state-space or linear-attention layers", _has_state_space_layers, _DENSE),
    Refusal(
        "image, audio or video positions",
        lambda m: bool(getattr(m, "is_multimodal", False)),
        f"{_DENSE}, or a text-only checkpoint of it with it",
    ),
    Refusal("chunked local attention", lambda m: m.attention_chunk_size is not None, _DENSE),
    Refusal("attention sinks", lambda m: bool(getattr(m, "has_attention_sinks", False)), _DENSE),
    Refusal("an embedding or reward model", lambda m: not m.is_generation, _DENSE),
    Refusal("values of another size than keys", lambda m: m.v_head_dim != m.head_dim, _DENSE),
)


def check_requested(arguments: Any) -> None:
    """Raise RefusedError naming what the user asked for that cannot be combined.

    Runs before SGLang resolves the arguments, whose own answer may name neither us nor a recipe.

    Args:
        arguments: an object with the server's arguments as attributes; those not given may lack.
    """
    _raise([f"{r.feature}: {r.recipe}" for r in ARGUMENTS if r.is_on(arguments)])


def check_arguments(server_args: Any, config: MultipoleConfig) -> None:
    """Raise RefusedError naming every argument and property of the model that is in the way.

    Args:
        server_args: SGLang's, resolved; what it has switched on itself counts too.
    """
    problems = [f"{r.feature}: {r.recipe}" for r in ARGUMENTS if r.is_on(server_args)]
    if not problems:
        model_config = server_args.get_model_config()
        problems = [
            f"{model_config.hf_config.architectures[0]} has {r.feature}: {r.recipe}"
            for r in MODELS
            if r.is_on(model_config)
        ]
    if not problems and config.audit_layer >= model_config.num_hidden_layers:
        problems.append(
            f"audit_layer {config.audit_layer}: the model has layers 0 to "
            f"{model_config.num_hidden_layers - 1}; choose one of them, or -1"
        )
    page_size = server_args.page_size or 1
    if config.recluster_interval % page_size:
        problems.append(
            f"--page-size {page_size}: recluster_interval ({config.recluster_interval} tokens) "
            "must be a multiple of it"
        )
    _raise(problems)


def check_runner(runner: Any) -> None:
    """Raise RefusedError if a layer or pool of the loaded model is not one that is supported."""
    problems = []
    for name, layer, rotary in sglang_compat.attention_layers(runner.model):
        if (layer.sliding_window_size or -1) > -1:
            problems.append(f"{name} has a sliding window: {_DENSE}")
        if layer.logit_cap:
            problems.append(f"{name} caps its logits: {_DENSE}")
        if layer.is_cross_attention:
            problems.append(f"{name} is cross-attention: {_DENSE}")
        if rotary is not None and type(rotary).__name__ not in SUPPORTED_ROTARY:
            problems.append(f"{name} has rotary positions of {type(rotary).__name__}: {_DENSE}")
        if rotary is not None and not rotary.is_neox_style:
            problems.append(f"{name} rotates neighbouring pairs (GPT-J style): {_DENSE}")
    pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    if type(pool).__name__ != SUPPORTED_KV_POOL:
        problems.append(f"KV pool {type(pool).__name__}, not {SUPPORTED_KV_POOL}: {_DENSE}")
    if type(allocator).__name__ not in SUPPORTED_ALLOCATORS:
        problems.append(f"KV allocator {type(allocator).__name__}: {_DENSE}")
    problems += _gpu_problems(runner) if str(runner.device).startswith("cuda") else []
    _raise(problems[:4])


def _gpu_problems(runner: Any) -> list[str]:
    """What the Triton kernels do not do."""
    return kernel_problems(
        runner.dtype, runner.model_config.head_dim, sglang_compat.gqa_group_size(runner.model)
    )


def kernel_problems(dtype: torch.dtype, head_dim: int, group: int) -> list[str]:
    """What of a model's type and sizes the Triton kernels do not do; group: gqa_group_size."""
    problems = []
    if dtype not in (torch.float16, torch.bfloat16):
        problems.append(f"dtype {dtype}: use --dtype bfloat16 or float16")
    if head_dim not in SUPPORTED_HEAD_DIMS:
        problems.append(f"head_dim {head_dim}, not one of {SUPPORTED_HEAD_DIMS}: {_DENSE}")
    if group > MAX_GQA_GROUP_SIZE:
        problems.append(f"{group} query heads a KV head, at most {MAX_GQA_GROUP_SIZE}: {_DENSE}")
    return problems


def _raise(problems: list[str]) -> None:
    if problems:
        raise RefusedError("multipole attention cannot serve this. " + "; ".join(problems))
