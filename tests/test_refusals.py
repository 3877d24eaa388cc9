"""What cannot be combined is refused with the recipe that works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_multipole import arguments, refusals, sglang_compat
from sglang_multipole.config import ConfigError, MultipoleConfig

CONFIG = MultipoleConfig()


def make_args(**changes):
    """ServerArgs as far as the rules look at it, of a server that can be served."""
    model = SimpleNamespace(
        attention_arch=SimpleNamespace(name="MHA"),
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        is_encoder_decoder=False,
        is_generation=True,
        num_hidden_layers=4,
        attention_chunk_size=None,
        head_dim=64,
        v_head_dim=64,
    )
    for name in list(changes):
        if name.startswith("model_"):
            setattr(model, name.removeprefix("model_"), changes.pop(name))
    values = {"decode_attention_backend": "multipole", "page_size": 1} | changes
    return SimpleNamespace(get_model_config=lambda: model, **values)


@pytest.fixture(autouse=True)
def without_state_space_layers(monkeypatch):
    monkeypatch.setattr(refusals, "_has_state_space_layers", lambda model: False)
    models = [r for r in refusals.MODELS if "state-space" not in r.feature]
    monkeypatch.setattr(refusals, "MODELS", models)


def test_a_plain_server_is_accepted():
    refusals.check_arguments(make_args(), CONFIG)
    refusals.check_arguments(make_args(device="cpu"), CONFIG)
    refusals.check_arguments(make_args(device="cuda", page_size=16), CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_algorithm": "EAGLE"}, "speculative decoding: leave out"),
        ({"pp_size": 2}, "pipeline parallelism: use --tp-size"),
        ({"enable_deterministic_inference": True}, "deterministic inference: leave out"),
        ({"rl_on_policy_target": "fsdp"}, "changes the log-probabilities"),
        ({"enable_unified_memory": True}, "unified memory pool"),
        ({"enable_hierarchical_cache": True}, "hierarchical cache"),
        ({"disaggregation_mode": "decode"}, "disaggregation: serve prefill and decode in one"),
        ({"enable_dp_attention": True}, "DP attention: use --dp-size"),
        ({"kv_cache_dtype": "fp4_e2m1"}, "quantised KV cache: use --kv-cache-dtype auto"),
        ({"enable_torch_compile": True}, "torch.compile: leave out"),
        ({"tokenizer_worker_num": 2}, "several tokenizer processes: leave out --tokenizer-worker"),
        ({"page_size": 48}, "recluster_interval .128 tokens. must be a multiple"),
        ({"page_size": 16, "device": "cpu"}, "pages above 1 on a CPU: use --page-size 1"),
        ({"decode_attention_backend": "triton"}, "another decode backend"),
        ({"model_attention_arch": SimpleNamespace(name="MLA")}, "LlamaForCausalLM has .*MLA"),
        ({"model_is_hybrid_swa": True}, "sliding-window layers: serve this model without"),
        ({"model_is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_is_multimodal": True}, "image, audio or video positions"),
        ({"model_v_head_dim": 32}, "values of another size"),
        ({"model_is_generation": False}, "embedding or reward"),
    ],
)
def test_each_conflict_is_named_with_its_recipe(changes, message):
    with pytest.raises(refusals.RefusedError, match=message):
        refusals.check_arguments(make_args(**changes), CONFIG)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("SGLANG_USE_HND_KVCACHE", "unset SGLANG_USE_HND_KVCACHE"),
        ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "KV sizing after graph capture"),
    ],
)
def test_environment_switches_are_refused_too(monkeypatch, variable, message):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(refusals.RefusedError, match=message):
        refusals.check_arguments(make_args(), CONFIG)


def test_an_audited_layer_that_the_model_lacks_is_refused():
    refusals.check_arguments(make_args(), MultipoleConfig(audit_layer=3))
    with pytest.raises(refusals.RefusedError, match="audit_layer 4: the model has layers 0 to 3"):
        refusals.check_arguments(make_args(), MultipoleConfig(audit_layer=4))


def test_all_conflicts_are_named_at_once():
    args = make_args(pp_size=2, enable_lmcache=True)
    with pytest.raises(refusals.RefusedError, match="pipeline.*LMCache"):
        refusals.check_arguments(args, CONFIG)


def test_the_flag_and_the_backend_name_ask_for_the_same():
    for asked in (
        {"enable_multipole": True},
        {"decode_attention_backend": "multipole"},
        {"attention_backend": "multipole"},
    ):
        values = {"attention_backend": None, "decode_attention_backend": None} | asked
        assert arguments.requested_config(values) == CONFIG
        assert values["decode_attention_backend"] == "multipole"
        assert values["attention_backend"] is None


def test_a_conflict_is_named_before_sglang_resolves_the_arguments():
    asked = {"enable_multipole": True, "enable_deterministic_inference": True}
    with pytest.raises(refusals.RefusedError, match="deterministic inference: leave out"):
        arguments.requested_config(asked)


@pytest.mark.parametrize(
    ("text_config", "base"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_parameters": {"full": {"rope_theta": 1e6}, "other": {"rope_theta": 1e4}}}, 1e6),
        ({"rope_parameters": None}, 1e4),
        ({}, 1e4),
    ],
)
def test_the_rope_base_is_read_from_either_form_of_a_configuration(text_config, base):
    model_config = SimpleNamespace(hf_text_config=SimpleNamespace(**text_config))
    assert sglang_compat.rope_base(model_config) == base


def test_what_the_model_chooses_travels_with_the_arguments(monkeypatch):
    monkeypatch.setattr("multipole_patches.apply_now", lambda patches: None)
    args = make_args(model_hf_text_config=SimpleNamespace(rope_theta=1e6))
    arguments.attach(args, CONFIG)
    assert sglang_compat.config_values(args)["segment_size"] == 4096


def test_without_the_flag_nothing_changes():
    values = {"attention_backend": "triton"}
    assert arguments.requested_config(values) is None
    assert values == {"attention_backend": "triton"}


def test_a_configuration_without_the_flag_is_an_error():
    with pytest.raises(ConfigError, match="without --enable-multipole; add it"):
        arguments.requested_config({"multipole_config": {"token_budget": 1}})


def test_multipole_cannot_prefill():
    with pytest.raises(ConfigError, match="decodes only"):
        arguments.requested_config({"prefill_attention_backend": "multipole"})


class _Layer(SimpleNamespace):
    sliding_window_size = -1
    logit_cap = 0.0
    is_cross_attention = False


class RotaryEmbedding(SimpleNamespace):
    is_neox_style = True


class MHATokenToKVPool:
    pass


class TokenToKVPoolAllocator:
    pass


@pytest.mark.parametrize(
    ("layer", "rotary", "pool", "message"),
    [
        (_Layer(), RotaryEmbedding(), MHATokenToKVPool(), None),
        (_Layer(), None, MHATokenToKVPool(), None),
        (_Layer(sliding_window_size=4096), RotaryEmbedding(), MHATokenToKVPool(), "sliding"),
        (_Layer(logit_cap=30.0), RotaryEmbedding(), MHATokenToKVPool(), "caps its logits"),
        (_Layer(is_cross_attention=True), RotaryEmbedding(), MHATokenToKVPool(), "cross-att"),
        (_Layer(), SimpleNamespace(is_neox_style=True), MHATokenToKVPool(), "SimpleNamespace"),
        (_Layer(), RotaryEmbedding(is_neox_style=False), MHATokenToKVPool(), "neighbouring"),
        (_Layer(), RotaryEmbedding(), object(), "KV pool object"),
    ],
)
def test_layers_and_pools_are_checked_once_they_exist(monkeypatch, layer, rotary, pool, message):
    monkeypatch.setattr(
        refusals.sglang_compat, "attention_layers", lambda model: [("model.0.attn", layer, rotary)]
    )
    runner = SimpleNamespace(
        device="cpu",
        model=None,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=TokenToKVPoolAllocator(),
    )
    if message is None:
        refusals.check_runner(runner)
    else:
        with pytest.raises(refusals.RefusedError, match=message):
            refusals.check_runner(runner)
