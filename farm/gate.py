"""The gate between a trained adapter and the registry: what is measured of it, and why it may not pass.

Everything is measured once, where the adapter is trained and judged (`farm.stages.assess`), and is in its manifest:
`summary["metrics"]`, which are the bytes of `metrics.json` too, and `summary["checks"]`. Latency is among the checks:
it is this machine's and never the same twice, and an artifact's files are the same bytes whoever makes them.

An adapter that does not pass stays in the store as it is, `preview.webp` included, and is in quarantine as long as the
gate says so: its reasons follow from its manifest and the configuration, so no copy of either can grow old. A laxer
limit lets it out; `farm publish --force` publishes it all the same, and its release says what was passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farm.artifacts import Manifest
from farm.config import AdaptersConfig
from farm.plan import Plan


def judgement(plan: Plan, adapter: Manifest) -> list[str]:
    """`reasons` of an adapter that is in the store."""
    return reasons(plan.config.adapters, plan.base.digest, adapter.summary["metrics"], adapter.summary["checks"])


def reasons(limits: AdaptersConfig, base: str, scores: Mapping[str, Any], checks: Mapping[str, Any]) -> list[str]:
    """Why an adapter may not be published, a clause each that names the key and the figures; none when it may.

    Args:
        base: digest of the base it is to fit.
        scores, checks: an `AdapterScores` and a `Checks` of `farm.stages.assess`.
    """
    if not checks["finite"]:  # what such weights draw says nothing more
        return ["its weights hold values that are not finite: lower adapters.train.learning_rate"]
    found = []
    if checks["base"] != base:
        found.append(f"it is an adapter of base {checks['base']}, not of base {base}")
    for layer, (rank, searched) in sorted(checks["other_ranks"].items()):
        found.append(f"its rank at {layer} is {rank}, the search's {searched}")
    if scores["l1"] > limits.max_l1_ratio * scores["l1_untouched"]:
        found.append(
            f"L1 to the teacher {scores['l1']:.3f} is over {limits.max_l1_ratio:g} of the untouched photo's "
            f"{scores['l1_untouched']:.3f} (adapters.max_l1_ratio)"
        )
    return found + (_below(limits, scores, checks) if limits.gate.enabled else [])


def _below(limits: AdaptersConfig, scores: Mapping[str, Any], checks: Mapping[str, Any]) -> list[str]:
    """Where it falls short of the limits of `adapters.gate`."""
    gate, found = limits.gate, []
    # Of a concept that the base makes itself nothing need be gained, only nothing lost.
    wanted = min(gate.min_gain_over_base, 0.0) if checks["in_base"] else gate.min_gain_over_base
    low, high = scores["interval"]["gain"]
    if high < wanted * scores["l1_base"]:
        found.append(
            f"L1 to the teacher {scores['l1']:.3f} is {scores['gain']:.3f} ({low:.3f} to {high:.3f}) less than the "
            f"base's without adapter, not {wanted:g} of its {scores['l1_base']:.3f} (adapters.gate.min_gain_over_base)"
        )
    for name, distance in scores["frechet"].items():
        untouched = scores["frechet_untouched"][name]
        if gate.max_distance_ratio is not None and distance > gate.max_distance_ratio * untouched:
            found.append(
                f"{name} {distance:.3f} is over {gate.max_distance_ratio:g} of the untouched photos' {untouched:.3f} "
                "(adapters.gate.max_distance_ratio)"
            )
    for name, what in (("variety", "differ from each other"), ("contrast", "differ from one colour")):
        limit, teacher = getattr(gate, f"min_{name}"), scores[f"{name}_teacher"]
        if scores[name] < limit * teacher:
            found.append(
                f"its pictures {what} by {scores[name]:.3f}, under {limit:g} of the teacher's {teacher:.3f} "
                f"(adapters.gate.min_{name})"
            )
    if gate.max_latency_ms is not None and checks["latency_ms"] > gate.max_latency_ms:
        found.append(
            f"one edit took {checks['latency_ms']:.1f} ms, over {gate.max_latency_ms:g} (adapters.gate.max_latency_ms)"
        )
    return found
