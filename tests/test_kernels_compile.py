"""Every kernel compiles for every architecture we name, on a machine with no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from multipole_kernels.cluster_selection import selection_constants
from multipole_kernels.cuda_kernel import compile_cubin
from multipole_kernels.launch_config import LaunchConfig, Team
from multipole_kernels.segment_snapshot import PoolIndex, SegmentSnapshot
from multipole_kernels.team_decode import team_constants
from tests.clustering_case import make_clustering_case
from tests.decode_case import make_case

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is never compiled"
)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, as (kernel, arguments), none of which runs."""
    recorded = []
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda self, *args, grid, warmup, **kwargs: recorded.append((self, kwargs)),
    )
    return recorded


def compile_launch(kernel, arguments, sm):
    """Compile a recorded launch as the JIT would specialise it."""
    signature, constexprs, attributes = {}, {}, {}
    for nth, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        as_constant = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or as_constant:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPE_NAMES[value.dtype]
            attributes[(nth,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(nth,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    return triton_compile(source, target=GPUTarget("cuda", sm, 32), options=options)


@pytest.mark.parametrize(
    ("sm", "head_dim", "gqa_group_size", "centroid_dtype", "clusters"),
    [
        pytest.param(80, 128, 4, None, 128, id="ampere"),
        pytest.param(80, 128, 4, torch.int8, 128, id="ampere-int8"),
        pytest.param(90, 128, 4, None, 128, id="hopper"),
        pytest.param(90, 128, 4, torch.float8_e4m3fn, 128, id="hopper-fp8"),
        pytest.param(90, 256, 16, None, 128, id="hopper-largest-head"),
        pytest.param(90, 96, 3, torch.int8, 128, id="hopper-head-not-a-power-of-two"),
        pytest.param(100, 128, 4, None, 128, id="blackwell"),
        pytest.param(100, 128, 4, torch.float8_e4m3fn, 128, id="blackwell-fp8"),
        pytest.param(80, 128, 4, torch.int8, 256, id="ampere-int8-two-tiles"),
        pytest.param(90, 128, 4, None, 256, id="hopper-two-tiles"),
        pytest.param(90, 128, 4, torch.int8, 256, id="hopper-int8-two-tiles"),
        pytest.param(90, 64, 3, None, 1024, id="hopper-longest-segment"),
        pytest.param(90, 256, 16, torch.int8, 128, id="hopper-int8-largest-head"),
        pytest.param(100, 128, 4, torch.int8, 256, id="blackwell-int8-two-tiles"),
    ],
)
def test_decode_compiles(launches, sm, head_dim, gqa_group_size, centroid_dtype, clusters):
    stages = {} if sm > 80 else {"coarse_num_stages": 2, "exact_num_stages": 2}
    config = LaunchConfig(num_sms=132, overlap_launches=sm > 80, **stages)
    case = make_case(
        [16 * clusters + 100],
        [1024],
        num_kv_heads=1,
        gqa_group_size=gqa_group_size,
        head_dim=head_dim,
        centroid_dtype=centroid_dtype,
        segment_size=16 * clusters,
        clusters_per_segment=clusters,
        config=config,
        device="cpu",
    )
    case.decode(counters=torch.zeros(1, 4, dtype=torch.int64))
    assert len(launches) == 3  # the plan, and two a layer beside the selection
    for kernel, arguments in launches:
        binary = compile_launch(kernel, arguments, sm)
        assert binary.metadata.shared <= SHARED_LIMIT[sm], kernel.__name__
    constants = selection_constants(case.pool_layer, case.workspace)
    assert compile_cubin("cluster_selection.cu", constants, divmod(sm, 10)).startswith(b"\x7fELF")


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("sm", "blocks", "head_dim", "gqa_group_size", "dtype", "centroid_dtype"),
    [
        pytest.param(90, 16, 128, 4, torch.bfloat16, torch.int8, id="hopper-int8"),
        pytest.param(90, 2, 128, 8, torch.bfloat16, None, id="hopper-largest"),
        pytest.param(90, 8, 96, 5, torch.float16, torch.float8_e4m3fn, id="hopper-odd-fp8"),
        pytest.param(100, 4, 64, 1, torch.bfloat16, torch.int8, id="blackwell-int8"),
    ],
)
def test_a_step_in_one_launch_compiles(sm, blocks, head_dim, gqa_group_size, dtype, centroid_dtype):
    case = make_case(
        [600],
        [64],
        num_kv_heads=2,
        gqa_group_size=gqa_group_size,
        head_dim=head_dim,
        dtype=dtype,
        centroid_dtype=centroid_dtype,
        config=LaunchConfig(num_sms=132),
        device="cpu",
    )
    team = Team(8, blocks, blocks_per_sm=2)
    constants = team_constants(dtype, case.pool_layer, case.workspace, team)
    for long_rows in (0, 1):
        binary = compile_cubin(
            "team_decode.cu", constants | {"LONG_ROWS": long_rows}, divmod(sm, 10)
        )
        assert binary.startswith(b"\x7fELF")


def test_a_cuda_kernel_that_does_not_compile_tells_why():
    with pytest.raises(RuntimeError, match='THREADS" is undefined'):
        compile_cubin("cluster_selection.cu", {}, (9, 0))


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_the_snapshot_compiles(launches, sm):
    index = PoolIndex(
        segment_slots=torch.zeros(9, 1024, dtype=torch.int32),
        segment_slot_generation=torch.zeros(9, 1024, dtype=torch.int32),
        segment_extent=torch.zeros(9, dtype=torch.int32),
        last_used=torch.zeros(9, dtype=torch.int64),
        segment_of_slot=torch.zeros(5000, dtype=torch.int32),
        slot_generation=torch.zeros(5000, dtype=torch.int32),
        open_place=torch.zeros(8, dtype=torch.int32),
    )
    snapshot = SegmentSnapshot(16, 128, 500, 5000, torch.device("cpu"))
    snapshot.take(
        index,
        torch.zeros(8, 4096, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.int64),
        7,
        min_context=4096,
        recluster_interval=128,
        num_sink_tokens=10,
    )
    assert len(launches) == 3
    for launch in launches:
        assert compile_launch(*launch, sm).metadata.shared <= SHARED_LIMIT[sm]


@pytest.mark.parametrize(
    ("sm", "head_dim", "segment_size", "centroid_dtype"),
    [
        pytest.param(80, 128, 2048, torch.float8_e4m3fn, id="ampere-fp8"),
        pytest.param(80, 128, 4096, torch.int8, id="ampere-most-clusters"),
        pytest.param(90, 128, 4096, torch.int8, id="hopper"),
        pytest.param(90, 256, 2048, None, id="hopper-largest-head"),
        pytest.param(90, 96, 2048, torch.int8, id="hopper-head-not-a-power-of-two"),
        pytest.param(100, 128, 2048, torch.int8, id="blackwell"),
    ],
)
def test_the_clustering_compiles(launches, sm, head_dim, segment_size, centroid_dtype):
    case = make_clustering_case(
        num_layers=1,
        num_kv_heads=1,
        head_dim=head_dim,
        segment_size=segment_size,
        tokens_per_cluster=16,
        max_cluster_size=128,
        centroid_dtype=centroid_dtype,
        num_rows=1,
        num_places=2,
        device="cpu",
    )
    case.clustering.cluster([(0, 1, segment_size, 1)])
    assert len(launches) == 6
    for kernel, arguments in launches:
        binary = compile_launch(kernel, arguments, sm)
        assert binary.metadata.shared <= SHARED_LIMIT[sm], kernel.__name__
