"""A decode step through the Triton path gives what the PyTorch path gives, on the same pool."""

from __future__ import annotations

import pytest
import torch

from sglang_multipole.config import MultipoleConfig
from sglang_multipole.torch_path import TorchPath
from tests.test_cluster_pool import GROUP, HEADS, NUM_SLOTS, SMALL, Host

pytestmark = pytest.mark.interpreted

# the kernels take 16 clusters or more a segment
CONFIG = MultipoleConfig.from_dict(SMALL.to_dict() | {"token_budget": 24})


@pytest.fixture
def host() -> Host:
    from sglang_multipole.step_buffers import StepBuffers, StepShape
    from sglang_multipole.triton_path import TritonPath

    host = Host(CONFIG, dim=64, dtype=torch.float16)
    pool = host.runtime.pool
    shape = StepShape(4, 1024, NUM_SLOTS, HEADS, GROUP, host.dim)
    buffers = StepBuffers(CONFIG, shape, "cpu", "cpu")
    host.runtime.path = host.path = TritonPath(pool, [host.layer], host.req_to_token, buffers)
    return host


def assert_paths_agree(host: Host, out: torch.Tensor) -> None:
    """Repeat the last step's attention by the PyTorch path."""
    rows = torch.tensor([row for row, _ in host.rows.values()])
    lengths = torch.tensor([length for _, length in host.rows.values()])
    path = TorchPath(host.runtime.pool, [host.layer], host.req_to_token)
    path.begin(rows, lengths, [CONFIG.token_budget] * len(rows), host.runtime.planner.step)
    expected = torch.full_like(out, torch.nan)
    path.attend(0, host.q, host.dim**-0.5, expected)
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < 3e-3
    found, counters, _ = path.results(len(rows)).read()
    own_found, own_counters, _ = host.path.results(len(rows)).read()
    assert own_counters == counters
    assert [row[: len(found[0])] for row in own_found.tolist()] == found.tolist()


def test_steps_of_a_ragged_batch_agree_and_are_counted(host):
    host.add("long", 1, 600)
    host.add("short", 2, 40)
    assert_paths_agree(host, host.step())
    host.add("fork", 3, 560, shared_with="long", prefix=500)
    for _ in range(2):
        assert_paths_agree(host, host.step())
    assert host.activities["long"].sparse_steps == 3
    assert host.activities["short"].dense_steps == 3
    assert host.activities["fork"].segments_shared == 3


def test_the_buffers_cost_on_a_machine_without_them_what_they_take(host):
    from sglang_multipole.step_buffers import StepBuffers, StepShape

    shape = StepShape(4, 1024, NUM_SLOTS, HEADS, GROUP, host.dim)
    assert StepBuffers(CONFIG, shape, "meta", "cpu").nbytes == host.path.nbytes > 0


def test_batches_that_the_buffers_admit_fit_them():
    """256 rows of 128K tokens on a pool of 374K: no rows x context buffers."""
    from sglang_multipole.step_buffers import MAX_SHARING, StepBuffers, StepShape

    config = MultipoleConfig(segment_size=2048)
    shape = StepShape(256, 131072, 374_000, 8, 4, 128)
    buffers = StepBuffers(config, shape, "meta", "cpu")
    assert buffers.limits.rows == 256
    assert buffers.limits.tokens == MAX_SHARING * 374_000
    plan = buffers.snapshot.plan
    # any batch within the limits: every token exact, or every segment an item, rounded up a row
    assert plan.exact_slots.shape[0] >= buffers.limits.tokens
    assert plan.item_place.shape[0] >= buffers.limits.tokens // config.segment_size + 256
    assert buffers.nbytes < 512 * 2**20


def test_budgets_are_those_of_the_step(host):
    """They are sent when they change, and the batch's size changes them too."""
    rows, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])
    token_budget = host.path.buffers.snapshot.plan.token_budget
    for budgets in ([24, 7, 9], [24, 7, 9], [8, 7, 9], [8, 7], [8, 7], [8, 7, 9]):
        host.path.begin(rows, lengths, budgets, 1)
        assert token_budget[:3].tolist() == [*budgets, 0][:3]


def test_padding_behind_the_batch_changes_nothing(host):
    host.add("a", 1, 300)
    out = host.step()
    host.path.begin(torch.tensor([1, 0, 0]), torch.tensor([301, 1, 1]), [24], 9)
    q = torch.cat([host.q, torch.zeros(2, HEADS * GROUP, host.dim, dtype=torch.float16)])
    padded = torch.full_like(q, torch.nan)
    host.path.attend(0, q, host.dim**-0.5, padded)
    torch.testing.assert_close(padded[:1], out, rtol=1e-3, atol=1e-3)
