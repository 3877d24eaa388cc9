"""Every wrong configuration gets an error that names the key, the limits and the unit."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_multipole.config import ConfigError, MultipoleConfig


def test_defaults_are_valid_and_survive_the_journey_to_other_processes():
    config = MultipoleConfig()
    assert MultipoleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_text_a_dict_and_a_file_give_the_same(tmp_path):
    path = tmp_path / "multipole.json"
    path.write_text('{"token_budget": 1024}')
    expected = MultipoleConfig(token_budget=1024)
    assert MultipoleConfig.parse('{"token_budget": 1024}') == expected
    assert MultipoleConfig.parse({"token_budget": 1024}) == expected
    assert MultipoleConfig.parse(f"@{path}") == expected
    assert MultipoleConfig.parse(None) == MultipoleConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"token_buget": 1}', "unknown key 'token_buget'.*did you mean 'token_budget'"),
        ('{"token_budget": -1}', "whole number of tokens, 0 to 1048576, got -1"),
        ('{"token_budget": 1.5}', "whole number of tokens.*got 1.5"),
        ('{"token_budget": true}', "whole number of tokens.*got True"),
        ('{"token_budget": "many"}', "whole number of tokens.*got 'many'"),
        ('{"token_budget": 1e999}', "whole number of tokens.*got inf"),
        ('{"strict_activation": 1}', "strict_activation must be true or false, got 1"),
        ('{"dense_backend": "fa9"}', "dense_backend must be one of auto, flashinfer"),
        ('{"min_context": {}}', "min_context by batch size must have batch sizes"),
        ('{"min_context": {"0": 9}}', "batch sizes from 1 to 999999 as keys.*example"),
        ('{"min_context": {"8": -1}}', r"min_context\['8'\] must be a whole number of tokens"),
        (
            '{"min_context": {"1": 9}, "strict_activation": true}',
            "give min_context as one number of tokens",
        ),
        ('{"segment_size": 64}', "segment_size must be 128 to 16384 tokens, or 0 .*, got 64"),
        ('{"segment_size": 1000}', r"segment_size \(1000 tokens\) must be a multiple"),
        ('{"segment_size": 384}', r"must be a multiple of 16 tokens_per_cluster \(256 tokens\)"),
        ('{"tokens_per_cluster": 48}', r"must be a multiple of tokens_per_cluster \(48 tokens\)"),
        ('{"num_sink_tokens": 128}', r"must be less than recluster_interval \(128 tokens\)"),
        ('{"centroid_dtype": "int4"}', "must be one of int8, fp8_e4m3, auto"),
        ("[1]", "must be a JSON object, got list"),
        ("{token_budget: 1}", "is not valid JSON.*example"),
        ("@/no/such/file", "cannot read /no/such/file"),
    ],
)
def test_a_wrong_configuration_is_refused_with_what_to_change(text, message):
    with pytest.raises(ConfigError, match=message):
        MultipoleConfig.parse(text)


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
_keys = st.one_of(
    st.sampled_from([f.name for f in dataclasses.fields(MultipoleConfig)]), st.text(max_size=20)
)


@settings(max_examples=1000)
@given(st.dictionaries(_keys, _values, max_size=4))
def test_any_dictionary_gives_a_configuration_or_a_named_error(values):
    with contextlib.suppress(ConfigError):
        config = MultipoleConfig.from_dict(values)
        assert config.to_dict() | values == config.to_dict()


@st.composite
def malformed(draw):
    """(values, word): one key of a configuration is wrong, and the error must have the word."""
    field = draw(st.sampled_from(dataclasses.fields(MultipoleConfig)))
    kind = draw(st.sampled_from(["misspelt", "type", "limit"]))
    limits = field.metadata.get("high") is not None
    if kind == "misspelt":
        name = field.name.replace("_", draw(st.sampled_from(["", "-", "__"])))
        name += draw(st.sampled_from(["", "s", "_tokens"]))
        if name == field.name:
            name += "x"
        return {name: field.default}, repr(name)
    if kind == "limit" and limits:
        low, high = field.metadata["low"], field.metadata["high"]
        above, below = st.integers(high + 1, high * 9), st.integers(low - 1000, low - 1)
        return {field.name: draw(above | below)}, f"{low} to {high}"
    wrong = [st.lists(st.integers(), max_size=2), st.none(), st.just("no such value")]
    if limits or field.metadata.get("is_text"):
        wrong.append(st.booleans())
    else:
        wrong.append(st.integers())
    return {field.name: draw(st.one_of(wrong))}, field.name


@settings(max_examples=1000)
@given(malformed())
def test_each_of_a_thousand_malformed_configurations_gets_an_error_that_names_it(case):
    values, word = case
    for given_as in (values, json.dumps(values)):
        with pytest.raises(ConfigError) as caught:
            MultipoleConfig.parse(given_as)
        assert word in str(caught.value)
        assert len(str(caught.value)) < 900


@given(st.text(max_size=40))
def test_any_text_gives_a_configuration_or_a_named_error(text):
    with contextlib.suppress(ConfigError):
        MultipoleConfig.parse(text)


@pytest.mark.parametrize(
    ("rope_base", "segment_size"),
    [(1e4, 2048), (1e5, 2048), (4e5, 2048), (5e5, 4096), (1e6, 4096), (1e7, 4096)],
)
def test_the_rope_base_chooses_the_segment_size_unless_it_is_given(rope_base, segment_size):
    assert MultipoleConfig().for_model(rope_base).segment_size == segment_size
    assert MultipoleConfig(segment_size=1024).for_model(rope_base).segment_size == 1024
    chosen = MultipoleConfig(token_budget=7).for_model(rope_base)
    assert chosen == MultipoleConfig(token_budget=7, segment_size=segment_size)


def test_a_chosen_segment_size_must_go_with_the_other_keys():
    with pytest.raises(ConfigError, match="segment_size .2048 tokens. must be a multiple of 16"):
        MultipoleConfig(tokens_per_cluster=256, recluster_interval=256).for_model(1e5)
    config = MultipoleConfig(recluster_interval=192)
    with pytest.raises(ConfigError, match="segment_size .2048 tokens. must be a multiple of recl"):
        config.for_model(1e5)


@given(st.integers(1, 200000))
def test_one_to_two_intervals_stay_exact_behind_the_clusters(seq_len):
    config = MultipoleConfig(min_context=0)
    clustered = config.clustered_tokens(seq_len)
    assert clustered % config.recluster_interval == 0
    assert clustered == 0 or 128 <= seq_len - clustered < 256
    assert seq_len < 256 or clustered > 0


def test_requests_below_the_gate_have_no_clusters():
    config = MultipoleConfig(min_context=4096)
    assert config.clustered_tokens(4095) == 0
    assert config.clustered_tokens(4096) == 3968


def test_the_gate_can_be_a_table_by_batch_size():
    config = MultipoleConfig.parse('{"min_context": {"16": 4096, "2": 16384, "8": 8192}}')
    sizes = (1, 2, 7, 8, 15, 16, 500)
    gates = [16384, 16384, 16384, 8192, 8192, 4096, 4096]
    assert [config.min_context_of(size) for size in sizes] == gates
    assert config.clustered_tokens(8192, 8) == config.clustered_tokens(16384, 7) - 8192 > 0
    assert config.clustered_tokens(8192, 7) == 0
    assert MultipoleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
