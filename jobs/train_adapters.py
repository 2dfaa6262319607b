"""Train, judge and publish an adapter for every concept from the queue.

ray job submit --working-dir . -- python jobs/train_adapters.py --config configs/demo.yaml
"""

from __future__ import annotations

import typer

from farm.cli import guard, run_stages
from farm.options import Config, Json, Override


def main(config: Config, override: Override = None, dry_run: bool = False, as_json: Json = False) -> None:
    """Train, judge and publish an adapter for every concept from the queue."""
    run_stages(config, override or [], ["adapters"], dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    guard(lambda: typer.run(main))
