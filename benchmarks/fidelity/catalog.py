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

# what ships: the definition in reference.py, with the segments of a RoPE base below 425,000;
# from there on segments of 4096 ship, "ours-4096"
DEFAULT = MultipoleChoices()

# name -> choices that differ from the default; a dict under "clustering" changes the clustering
OURS: dict[str, dict] = {
    "ours": {},
    "ours-residual": {"score": "residual"},
    "ours-fill": {"rule": "fill"},
    "ours-residual-fill": {"score": "residual", "rule": "fill"},
    "ours-fp8": {"number_format": "fp8"},
    "ours-bf16": {"number_format": "bf16"},
    "ours-isotropic": {"variance": "isotropic", "max_variance": 1.0},
    "ours-ratio-8": {"clustering": {"tokens_per_cluster": 8, "max_cluster_size": 64}},
    "ours-ratio-12": {"clustering": {"tokens_per_cluster": 12, "max_cluster_size": 96}},
    "ours-lloyd-6": {"clustering": {"num_lloyd_iters": 6}},
    "ours-lloyd-10": {"clustering": {"num_lloyd_iters": 10}},
    "ours-seed-1": {"clustering": {"seed": 1}},
    "ours-cap-64": {"clustering": {"max_cluster_size": 64}},
    "ours-cap-none": {"clustering": {"max_cluster_size": None}},
    "ours-dissolve-needed": {"clustering": {"dissolve_needed": True}},
    "ours-offline": {"clustering": {"segment_size": 1 << 30}},  # one segment
    "ours-1024": {"clustering": {"segment_size": 1024}},
    "ours-4096": {"clustering": {"segment_size": 4096}},
    "ours-4096-seed-1": {"clustering": {"segment_size": 4096, "seed": 1}},
    "ours-8192": {"clustering": {"segment_size": 8192}},
    "ours-4096-ratio-12": {
        "clustering": {"segment_size": 4096, "tokens_per_cluster": 12, "max_cluster_size": 96}
    },
}

# behind one of these names: with all of k-means' seeds placed by position
PLACE_SEEDS = "-place-seeds"

# what the first study started from: its variants below change this
STUDY = MultipoleChoices(
    clustering=Clustering(segment_size=1024, max_cluster_size=64, far_seeds=False),
    number_format="fp8",
    variance="isotropic",
    max_variance=1.0,
)

# name -> choices that differ from STUDY
VARIANTS: dict[str, dict] = {
    "s1024": {},
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
FINE = Clustering(segment_size=1024, tokens_per_cluster=8, max_cluster_size=32, far_seeds=False)
TWO_LEVEL = {
    "two-level": (FINE, 0.375),
    "two-level-25": (FINE, 0.25),
    "2048-two-level": (replace(FINE, segment_size=2048), 0.375),
    "2048-two-level-25": (replace(FINE, segment_size=2048), 0.25),
}


def changed(
    name: str,
    base: MultipoleChoices,
    calibration: Calibration | None = None,
    clustering: dict | None = None,
    **changes,
) -> Multipole:
    """A method of the base's choices, some of them changed."""
    clustering = replace(base.clustering, **(clustering or {}))
    return Multipole(name, replace(base, clustering=clustering, **changes), calibration)


def ours(name: str = "ours", **changes) -> Multipole:
    """What ships, with some choices changed."""
    return changed(name, DEFAULT, **changes)


def ours_with_placed_seeds(name: str) -> Multipole:
    """OURS, named without PLACE_SEEDS, with the seeds that shipped before the farthest tokens."""
    changes = OURS[name.removesuffix(PLACE_SEEDS)]
    clustering = changes.get("clustering", {}) | {"far_seeds": False}
    return ours(name, **(changes | {"clustering": clustering}))


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
    """The methods of these names, in their order; all but those of PLACE_SEEDS for None."""
    catalog = {m.name: m for m in rivals()}
    for name, changes in OURS.items():
        catalog[name] = ours(name, **changes)
    for name, changes in VARIANTS.items():
        catalog[name] = changed(name, STUDY, calibration, **changes)
    for name, (clustering, refined) in TWO_LEVEL.items():
        catalog[name] = TwoLevel(name, clustering, refined=refined)
    for name in names or []:
        if name.endswith(PLACE_SEEDS) and name.removesuffix(PLACE_SEEDS) in OURS:
            catalog[name] = ours_with_placed_seeds(name)
    unknown = set(names or []) - set(catalog)
    if unknown:
        raise ValueError(f"catalog: unknown methods {sorted(unknown)}; there are {list(catalog)}")
    return [catalog[name] for name in names or catalog]
