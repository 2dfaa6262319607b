"""Ingest photos, choose training images and have the teachers edit them for every concept.

ray job submit --working-dir . -- python jobs/build_concepts.py --config configs/demo.yaml
"""

from __future__ import annotations

import typer

from farm.cli import guard, run_stages
from farm.options import Config, Json, Override


def main(config: Config, override: Override = None, dry_run: bool = False, as_json: Json = False) -> None:
    """Ingest photos, choose training images and have the teachers edit them for every concept."""
    run_stages(config, override or [], ["concepts"], dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    guard(lambda: typer.run(main))
