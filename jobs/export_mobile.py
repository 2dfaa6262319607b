"""Export published concepts as packs for phones, each pack a Ray task.

ray job submit --working-dir . -- python jobs/export_mobile.py --config configs/demo.yaml --all --max-mb 20
"""

from __future__ import annotations

import typer

from farm.cli import guard
from farm.cli_export import Chosen, Everything, MaxMb, Out, PackFormat, Precision, Side, Since, export_published
from farm.options import Config, Json, Override


def main(
    config: Config,
    format: PackFormat = "coreml",
    concepts: Chosen = None,
    everything: Everything = False,
    max_mb: MaxMb = None,
    precision: Precision = None,
    side: Side = None,
    out: Out = None,
    since: Since = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Export published concepts as packs for phones, each pack a Ray task; exits with 1 when a concept was left out."""
    export_published(
        config,
        override or [],
        format=format,
        concepts=concepts or [],
        everything=everything,
        max_mb=max_mb,
        precision=precision,
        side=side,
        out=out,
        since=since,
        as_json=as_json,
        on_ray=True,
    )


if __name__ == "__main__":
    guard(lambda: typer.run(main))
