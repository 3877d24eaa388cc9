"""Launch configurations of the decode kernels: a table by compute capability.

The rows are measured (benchmarks/decode_attention.py) or, where marked, reasoned from the shared
memory of the card. Nothing is tuned at run time.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Team:
    """Blocks that attend together for one (row, KV head), in one launch: a thread-block cluster.

    max_row_heads: rows times KV heads up to which the launch has this shape.
    max_row_clusters: clusters of the longest row that there can be, up to which it has.
    """

    max_row_heads: int
    blocks: int
    max_row_clusters: int = 1 << 30
    threads: int = 256
    blocks_per_sm: int = 1


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Block shapes, warps and pipeline depths of the three launches of a decode step."""

    num_sms: int
    # coarse attention: tokens a block gathers at a time
    coarse_block_tokens: int = 64
    coarse_num_warps: int = 4
    coarse_num_stages: int = 3
    coarse_max_registers: int | None = None
    # blocks that fit a multiprocessor, with 16-bit and with 8-bit centroids
    coarse_resident_blocks: tuple[int, int] = (3, 3)
    # selection: threads of a block; clusters of a row, of 8 bytes each, held in shared memory
    select_threads: int = 1024
    select_resident_clusters: int = 8192
    # exact attention to the selected tokens
    exact_block_tokens: int = 64
    exact_num_warps: int = 4
    exact_num_stages: int = 3
    exact_max_registers: int | None = None
    # parts merged with their loads in flight together
    merge_parts_at_once: int = 16
    exact_blocks_per_sm: int = 3
    # programmatic dependent launch: a kernel's blocks are placed before its predecessor ends
    overlap_launches: bool = False
    # a step in one launch, by rising max_row_heads; a larger batch takes three
    teams: tuple[Team, ...] = ()


_BY_CAPABILITY: dict[int, dict[str, object]] = {
    # Ampere (A100, 164 KiB; 86 and 89 have 100 KiB): reasoned
    8: {"exact_num_stages": 2},
    # Hopper: measured, but for the team of 8
    9: {
        "overlap_launches": True,
        # two blocks a multiprocessor: not every group of multiprocessors has 16 for a team of 16
        "teams": (
            Team(8, 16, max_row_clusters=8192, blocks_per_sm=2),
            Team(16, 8, max_row_clusters=1024, blocks_per_sm=2),
            Team(32, 4, max_row_clusters=1024, blocks_per_sm=2),
            Team(128, 2, max_row_clusters=1024, blocks_per_sm=2),
        ),
    },
    # Blackwell: reasoned, as Hopper
    10: {"overlap_launches": True},
}

# what the interpreter and compile-only runs assume: shapes, not speed
_WITHOUT_A_GPU = LaunchConfig(num_sms=4, coarse_block_tokens=32, exact_block_tokens=32)


@functools.cache
def launch_config(device: torch.device) -> LaunchConfig:
    """The configuration of a device; an unknown capability takes the nearest lower one's."""
    if device.type != "cuda":
        return _WITHOUT_A_GPU
    properties = torch.cuda.get_device_properties(device)
    known = [major for major in _BY_CAPABILITY if major <= properties.major]
    overrides = _BY_CAPABILITY[max(known)] if known else {}
    return LaunchConfig(num_sms=properties.multi_processor_count, **overrides)
