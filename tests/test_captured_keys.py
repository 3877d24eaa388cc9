"""CapturedKeys: the model's own logits, and content that repeats once RoPE is taken off."""

from __future__ import annotations

import pytest
import torch

from benchmarks.captured_keys import CapturedKeys

HEADS, TOKENS, HEAD_DIM, QUERIES = 2, 32, 8, 5


@pytest.fixture
def kept(tmp_path):
    """What benchmarks.capture_keys would keep of a model, and its file."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).half()

    kept = {
        "keys": normal(HEADS, TOKENS, HEAD_DIM),
        "values": normal(HEADS, TOKENS, HEAD_DIM),
        "queries": normal(HEADS, 3, QUERIES, HEAD_DIM),
        "inverse_frequency": 100.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)),
    }
    path = tmp_path / "keys.pt"
    torch.save(kept, path)
    return kept, str(path)


def test_logits_over_the_last_repetition_are_the_models(kept):
    kept, path = kept
    source = CapturedKeys(path, HEADS, 4, "cpu")
    keys, values, query = source.make(80, torch.Generator().manual_seed(1))
    assert keys.shape == values.shape == (80, HEADS, 2 * HEAD_DIM)
    # [H, G, T]
    logits = query.view(HEADS, 4, -1) @ keys[-TOKENS:].permute(1, 2, 0) * (2 * HEAD_DIM) ** -0.5
    captured = kept["queries"].float().flatten(1, 2) @ kept["keys"].float().mT * HEAD_DIM**-0.5
    for head in range(HEADS):
        for row in logits[head]:
            assert (captured[head] - row).abs().amax(-1).min() < 1e-5


def test_without_rope_the_text_repeats(kept):
    _, path = kept
    source = CapturedKeys(path, HEADS, 4, "cpu")
    keys, _, _ = source.make(80, torch.Generator())
    features = source.features(keys.transpose(0, 1), 0, 80)
    torch.testing.assert_close(features[:, 16:48], features[:, 48:], rtol=0, atol=1e-5)
    assert (keys[16:48] - keys[48:]).abs().max() > 0.5
    # a segment's features are the same whether it is turned back alone or with the others
    alone = source.features(keys.transpose(0, 1)[:, 30:60], 30, 80)
    torch.testing.assert_close(alone, features[:, 30:60], rtol=0, atol=1e-6)
