"""Every setting of a request gives a budget or an error that names what to change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_multipole.config import ConfigError, MultipoleConfig
from sglang_multipole.request_settings import (
    RequestSettingsError,
    accepted_token_budget,
    token_budget,
)
from sglang_multipole.segment_planner import SWITCHED_OFF
from tests.test_cluster_pool import SMALL, Host

CONFIG = MultipoleConfig(token_budget=512, max_token_budget=2048)


@pytest.mark.parametrize(
    ("custom_params", "budget"),
    [
        (None, 512),
        ({}, 512),
        ({"another_extension": [1]}, 512),
        ({"multipole": None}, 512),
        ({"multipole": True}, 512),
        ({"multipole": {}}, 512),
        ({"multipole": {"token_budget": None}}, 512),
        ({"multipole": {"token_budget": 0}}, 0),
        ({"multipole": {"token_budget": 2048}}, 2048),
        ({"multipole": False}, SWITCHED_OFF),
    ],
)
def test_a_request_gets_the_budget_it_asks_for(custom_params, budget):
    assert token_budget(custom_params, CONFIG) == budget


@pytest.mark.parametrize(
    ("custom_params", "message"),
    [
        ("multipole", "custom_params must be a JSON object, got 'multipole'.*examples"),
        ({"multipole": "off"}, "must be true, false or a JSON object, got 'off'"),
        ({"multipole": 0}, "must be true, false or a JSON object, got 0"),
        ({"multipole": {"token_budgt": 1}}, "unknown key 'token_budgt'; did you mean"),
        ({"multipole": {"x": 1}}, "unknown key 'x'; known: token_budget"),
        ({"multipole": {"token_budget": 2049}}, "0 to 2048 .the server's max_token_budget., got"),
        ({"multipole": {"token_budget": -1}}, "0 to 2048.*got -1"),
        ({"multipole": {"token_budget": 1.5}}, "whole number of tokens.*got 1.5"),
        ({"multipole": {"token_budget": True}}, "whole number of tokens.*got True"),
        ({"multipole": {"token_budget": "9" * 500}}, r"got '9+\.\.\."),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_change(custom_params, message):
    with pytest.raises(RequestSettingsError, match=message):
        token_budget(custom_params, CONFIG)
    # past the check it must stop nothing
    assert accepted_token_budget(custom_params, CONFIG) == 512


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
near_misses = st.fixed_dictionaries(
    {"multipole": _json | st.fixed_dictionaries({"token_budget": _json})}
)


@settings(max_examples=1000)
@given(_json | near_misses)
def test_any_json_gives_a_budget_or_a_named_error(custom_params):
    budget, message = None, ""
    try:
        budget = token_budget(custom_params, CONFIG)
    except RequestSettingsError as error:
        message = str(error)
    if message:
        assert "multipole" in message
        assert len(message) < 400
        assert accepted_token_budget(custom_params, CONFIG) == 512
    else:
        assert budget == SWITCHED_OFF or 0 <= budget <= 2048


def test_the_limit_is_chosen_when_none_is_given():
    assert MultipoleConfig().token_budget_limit == 4096
    assert MultipoleConfig(token_budget=9000).token_budget_limit == 9000
    with pytest.raises(ConfigError, match="at most max_token_budget .100 tokens."):
        MultipoleConfig(token_budget=512, max_token_budget=100)


def test_other_requests_of_the_batch_are_untouched():
    """Two equal batches but for one request's settings: the others' outputs are equal bits."""
    outs = []
    for budgets in ({}, {"b": SWITCHED_OFF, "c": 96}):
        host = Host(SMALL)
        for row, rid in enumerate("abcd", 1):
            host.add(rid, row, 300 + row)
        host.budgets = budgets
        outs.append([host.step() for _ in range(3)])
    for plain, changed in zip(*outs, strict=True):
        assert plain[0].equal(changed[0])
        assert plain[3].equal(changed[3])
        assert not plain[1].equal(changed[1])
        assert not plain[2].equal(changed[2])


def test_a_request_that_is_switched_off_is_exact_and_builds_nothing():
    host = Host(SMALL)
    host.add("a", 1, 300)
    host.budgets = {"a": SWITCHED_OFF}
    for _ in range(3):
        out = host.step()
        assert (out - host.dense()).abs().max() < 1e-5
    activity = host.activities["a"]
    assert activity.exact_tokens == activity.context_tokens
    assert activity.sparse_steps == activity.segments_built == 0
    assert host.runtime.dense_steps["switched_off"] == activity.dense_steps == 3
    assert len(host.runtime.planner.free) == host.runtime.planner.num_places - 1


def test_a_larger_budget_attends_to_more_tokens():
    host = Host(SMALL)
    host.add("a", 1, 300)
    host.add("b", 2, 300)
    host.budgets = {"b": 120}
    for _ in range(3):
        host.step()
    more = host.activities["b"].exact_tokens - host.activities["a"].exact_tokens
    assert 0 < more <= 3 * (120 - SMALL.token_budget + SMALL.max_cluster_size)
    assert host.runtime.totals.sparse_steps == 6
