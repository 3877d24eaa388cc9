"""Named methods: the rivals, ours, and ours with one choice changed."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.fidelity.methods.base import Method
from benchmarks.fidelity.methods.clusters import Clustering
from benchmarks.fidelity.methods.dense import Dense
from benchmarks.fidelity.methods.features import Calibration
from benchmarks.fidelity.methods.multipole import Multipole, MultipoleChoices
from benchmarks.fidelity.methods.oracle import OracleTopK
from benchmarks.fidelity.methods.paper import PaperMultipole
from benchmarks.fidelity.methods.quest import Quest
from benchmarks.fidelity.methods.two_level import TwoLevel
from benchmarks.fidelity.methods.window import SinksAndWindow

DEFAULT = MultipoleChoices()

# name of the variant -> changed choices; a dict under "clustering" changes the clustering
VARIANTS: dict[str, dict] = {
    # what is clustered, and in which metric
    "rotated": {"clustering": {"features": "rotated"}},
    "joint": {"clustering": {"features": "joint"}},
    "content-pair": {"clustering": {"metric": "pair"}},
    "joint-pair": {"clustering": {"features": "joint", "metric": "pair"}},
    "rotated-moment": {"clustering": {"features": "rotated", "metric": "moment"}},
    "rotated-tempered": {"clustering": {"features": "rotated", "metric": "tempered"}},
    "rotated-ridge": {"clustering": {"features": "rotated", "metric": "ridge"}},
    # the clustering's size
    "segment-512": {"clustering": {"segment_size": 512}},
    "segment-2048": {"clustering": {"segment_size": 2048}},
    "segment-4096": {"clustering": {"segment_size": 4096}},
    "offline": {"clustering": {"segment_size": 8192}},
    "ratio-8": {"clustering": {"tokens_per_cluster": 8, "max_cluster_size": 32}},
    "ratio-12": {"clustering": {"tokens_per_cluster": 12, "max_cluster_size": 48}},
    "ratio-24": {"clustering": {"tokens_per_cluster": 24, "max_cluster_size": 96}},
    "ratio-32": {"clustering": {"tokens_per_cluster": 32, "max_cluster_size": 128}},
    "cap-none": {"clustering": {"max_cluster_size": None}},
    "cap-32": {"clustering": {"max_cluster_size": 32}},
    "lloyd-2": {"clustering": {"num_lloyd_iters": 2}},
    "lloyd-10": {"clustering": {"num_lloyd_iters": 10}},
    "seed-1": {"clustering": {"seed": 1}},
    "seed-2": {"clustering": {"seed": 2}},
    # what is stored
    "bf16": {"number_format": "bf16"},
    "int8": {"number_format": "int8"},
    "fp32-bound": {"number_format": "float32"},
    # the tail's mass
    "variance-none": {"variance": "none"},
    "variance-constant": {"variance": "constant"},
    "isotropic-clip-2": {"max_variance": 2.0},
    "pair": {"variance": "pair", "max_variance": 2.0},
    "pair-clip-4": {"variance": "pair", "max_variance": 4.0},
    "pooled": {"variance": "pooled", "max_variance": 2.0},
    "pooled-clip-4": {"variance": "pooled", "max_variance": 4.0},
    "true-variance": {"variance": "true", "max_variance": 4.0},
    "drop-tail": {"drop_tail": True},
    # what is attended exactly
    "centroid-share": {"score": "centroid-share"},
    "corrected": {"score": "corrected"},
    "residual": {"score": "residual"},
    "optimistic": {"score": "optimistic"},
    "mass": {"score": "mass"},
    "group-max": {"group": "max"},
    "fill": {"rule": "fill"},
    # combinations
    "pair-corrected": {"variance": "pair", "max_variance": 4.0, "score": "corrected"},
    "pair-residual": {"variance": "pair", "max_variance": 4.0, "score": "residual"},
    "pooled-corrected": {"variance": "pooled", "max_variance": 4.0, "score": "corrected"},
    "pooled-residual": {"variance": "pooled", "max_variance": 4.0, "score": "residual"},
    "pooled-optimistic": {"variance": "pooled", "max_variance": 4.0, "score": "optimistic"},
}


S2048 = {"segment_size": 2048}
VARIANTS |= {
    "half-whitened": {"clustering": {"metric": "half-whitened"}},
    "whitened": {"clustering": {"metric": "whitened"}},
    "values-25": {"value_fraction": 0.25},
    "heads": {"rule": "heads", "cap_factor": 2.0},
    "2048-half-whitened": {"clustering": S2048 | {"metric": "half-whitened"}},
    "2048-joint": {"clustering": S2048 | {"features": "joint"}},
    "2048-lloyd-10": {"clustering": S2048 | {"num_lloyd_iters": 10}},
    "2048-ratio-12": {"clustering": S2048 | {"tokens_per_cluster": 12, "max_cluster_size": 48}},
    "2048-ratio-24": {"clustering": S2048 | {"tokens_per_cluster": 24, "max_cluster_size": 96}},
    "2048-cap-32": {"clustering": S2048 | {"max_cluster_size": 32}},
    "2048-cap-none": {"clustering": S2048 | {"max_cluster_size": None}},
    "2048-cap-128": {"clustering": S2048 | {"max_cluster_size": 128}},
    "2048-cap-256": {"clustering": S2048 | {"max_cluster_size": 256}},
    "cap-128": {"clustering": {"max_cluster_size": 128}},
    "2048-values-25": {"clustering": S2048, "value_fraction": 0.25},
    "2048-fill": {"clustering": S2048, "rule": "fill"},
    "2048-max": {"clustering": S2048, "group": "max"},
    "2048-corrected": {"clustering": S2048, "score": "corrected"},
    "2048-optimistic": {"clustering": S2048, "score": "optimistic"},
    "2048-residual": {"clustering": S2048, "score": "residual"},
    "2048-pair": {"clustering": S2048, "variance": "pair", "max_variance": 2.0},
    "2048-pooled": {"clustering": S2048, "variance": "pooled", "max_variance": 2.0},
    "pair-residual-fill": {
        "variance": "pair",
        "max_variance": 2.0,
        "score": "residual",
        "rule": "fill",
    },
    "2048-pair-residual": {
        "clustering": S2048,
        "variance": "pair",
        "max_variance": 2.0,
        "score": "residual",
    },
    "2048-pair-residual-fill": {
        "clustering": S2048,
        "variance": "pair",
        "max_variance": 2.0,
        "score": "residual",
        "rule": "fill",
    },
    "2048-pair-corrected-fill": {
        "clustering": S2048,
        "variance": "pair",
        "max_variance": 2.0,
        "score": "corrected",
        "rule": "fill",
    },
    "2048-isotropic-optimistic-fill": {
        "clustering": S2048,
        "score": "optimistic",
        "rule": "fill",
    },
    "2048-seed-1": {"clustering": S2048 | {"seed": 1}},
    "2048-bf16": {"clustering": S2048, "number_format": "bf16"},
}

PAIR_RESIDUAL_FILL = {
    "variance": "pair",
    "max_variance": 2.0,
    "score": "residual",
    "rule": "fill",
}
VARIANTS |= {
    "2048-prf-ratio-8": PAIR_RESIDUAL_FILL
    | {"clustering": S2048 | {"tokens_per_cluster": 8, "max_cluster_size": 32}},
    "2048-prf-ratio-8-cap-64": PAIR_RESIDUAL_FILL
    | {"clustering": S2048 | {"tokens_per_cluster": 8, "max_cluster_size": 64}},
    "2048-prf-ratio-12": PAIR_RESIDUAL_FILL
    | {"clustering": S2048 | {"tokens_per_cluster": 12, "max_cluster_size": 64}},
    "2048-prf-cap-128": PAIR_RESIDUAL_FILL | {"clustering": S2048 | {"max_cluster_size": 128}},
    "2048-prf-joint": PAIR_RESIDUAL_FILL | {"clustering": S2048 | {"features": "joint"}},
    "4096-prf": PAIR_RESIDUAL_FILL | {"clustering": {"segment_size": 4096}},
    "offline-prf": PAIR_RESIDUAL_FILL | {"clustering": {"segment_size": 8192}},
}

# name -> clustering of the fine level, part of it that is read
FINE = Clustering(tokens_per_cluster=8, max_cluster_size=32)
TWO_LEVEL = {
    "two-level": (FINE, 0.375),
    "two-level-25": (FINE, 0.25),
    "2048-two-level": (replace(FINE, segment_size=2048), 0.375),
    "2048-two-level-25": (replace(FINE, segment_size=2048), 0.25),
}


def ours(name: str = "ours", calibration: Calibration | None = None, **changes) -> Multipole:
    """The definition in reference.py with 8-bit centroids, with some choices changed."""
    clustering = replace(Clustering(), **changes.pop("clustering", {}))
    return Multipole(name, replace(DEFAULT, clustering=clustering, **changes), calibration)


def rivals() -> list[Method]:
    """Everything that is not ours."""
    return [
        Dense(),
        OracleTopK(),
        OracleTopK("oracle-same-tokens", charged_as=ours()),
        SinksAndWindow(),
        Quest(),
        Quest(group="max"),
        PaperMultipole(),
        PaperMultipole(drop_tail=True),
    ]


def methods(names: list[str] | None = None, calibration: Calibration | None = None):
    """The methods of these names, in their order; all of them for None."""
    catalog = {m.name: m for m in [*rivals(), ours()]}
    for name, changes in VARIANTS.items():
        catalog[name] = ours(name, calibration, **changes)
    for name, (clustering, refined) in TWO_LEVEL.items():
        catalog[name] = TwoLevel(name, clustering, refined=refined)
    unknown = set(names or []) - set(catalog)
    if unknown:
        raise ValueError(f"catalog: unknown methods {sorted(unknown)}; there are {list(catalog)}")
    return [catalog[name] for name in names or catalog]
