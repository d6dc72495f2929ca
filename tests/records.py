"""Small records of every kind, with numbers that can be checked by eye."""

from __future__ import annotations

from typing import Any

LATENCY = {"median": 4.0, "lower": 3.5, "upper": 5.0, "runs": 30, "threads": 1, "device": "cpu"}
COST = {"params": 2000, "bytes": 8000, "macs": 5000, "peak": 640, "latency": LATENCY}
HALF = {**COST, "params": 1000, "macs": None, "latency": {**LATENCY, "median": 2.0}}
STAGE = {
    **{"name": "trained-1", "part": 1, "images": 676, "epochs": 8, "seconds": 3.25},
    **{"params": 1234, "before": None, "accuracy": 91.5},
}
LAYER = {"layer": "conv1", "error": 0.25, "variance_ratio": 0.875}

RECORDS: dict[str, dict[str, Any]] = {
    "comparison": {
        "original": {"params": 1_500_000, "macs": 3_000_000, "channels": 10, "accuracy": 87.25},
        "rows": [
            {
                **{"method": "select", "channels_removed": 0.5, "params": 750_000},
                **{"params_removed": 0.5, "macs": 1_000_000, "macs_removed": 0.667},
                **{"accuracy": 31.125, "seconds": 1.5},
            }
        ],
    },
    "divergence": {
        "measure": "logits",
        "images": 10,
        "rows": [
            {
                **{"method": "moment", "channels_removed": 0.3, "mean": 1.5},
                **{"quartiles": [1.0, 1.4, 2.0], "edges": [0.0, 1.0, 2.0, 9.0]},
                **{"counts": [2, 7, 1], "layers": [LAYER]},
            }
        ],
    },
    "landscape": {
        "measure": "accuracy",
        "channels_removed": 0.4,
        "anchors": [
            {"name": "original", "x": 0.0, "y": 0.0, "value": 90.0},
            {"name": "intra-fusion", "x": 2.0, "y": 0.0, "value": 70.0},
            {"name": "select", "x": 1.0, "y": 3.0, "value": 20.0},
        ],
        "x": [0.0, 1.0, 2.0],
        "y": [0.0, 3.0],
        "values": [[90.0, 85.0, 70.0], [40.0, 20.0, 10.0]],
    },
    "sensitivity": {
        "original": 90.0,
        "shares": [0.3, 0.7],
        "rows": [
            {"group": "conv1", "method": "select", "accuracies": [60.0, 20.0]},
            {"group": "conv2", "method": "select", "accuracies": [89.0, 81.0]},
        ],
    },
    "ablation": {
        "setting": "marginals",
        "accuracies": {"uTuS": [80.0, 70.0], "iTiS": [82.0, 60.0]},
        "statistic": 0.6,
        "p_value": 0.439,
    },
    "cost": {
        "inputs": [[1, 3, 32, 32]],
        "rows": [{"network": "before", **COST}, {"network": "after", **HALF}],
    },
    "fusion": {
        "networks": ["a.safetensors", "b.safetensors"],
        "sizes": [1000, 2000],
        "weights": [0.5, 0.5],
        "method": "ot",
        "params": 1000,
        "seconds": 1.25,
        "figures": {"accuracy_of_networks": [90.5, 91.0], "accuracy": 88.75},
    },
    "factorized": {
        "scheme": "paf",
        "workers": "local",
        "received": 4_826_655,
        "seconds": 5.5,
        "records": [
            *[STAGE, {**STAGE, "part": 2}],
            {**STAGE, "name": "fused", "part": 0, "seconds": 2.25, "before": 50.0},
        ],
        "recipe": {"scheme": "paf"},
    },
    "pruning": {
        "method": {"name": "intra-fusion"},
        "before": {"channels": 24, "params": 3000, "macs": 9000},
        "after": {"channels": 12, "params": 1000, "macs": 3000},
        "removed": {"channels": 0.5, "params": 0.667, "macs": 0.667},
        "widths": {
            name: {
                **{"index": i, "before": 8 + 8 * i, "after": 4 + 4 * i},
                **{"written_by": [name], "read_by": ["fc"]},
            }
            for i, name in enumerate(("conv2", "conv1"))
        },
        "notes": {"conv1": {"chosen": "select"}},
        "latency": {"before": LATENCY, "after": {**LATENCY, "median": 1.0}},
        "figures": {"accuracy_before": 90.0, "accuracy": 80.0},
    },
}
