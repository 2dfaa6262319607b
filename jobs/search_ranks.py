"""Run the doubling LoRA rank search on the concepts of ranks.concepts with Ray Tune.

ray job submit --working-dir . -- python jobs/search_ranks.py --config configs/demo.yaml
"""

from __future__ import annotations

import typer

from farm.cli import guard, run_stages
from farm.options import Config, Json, Override


def main(config: Config, override: Override = None, dry_run: bool = False, as_json: Json = False) -> None:
    """Run the doubling LoRA rank search on the concepts of ranks.concepts with Ray Tune."""
    run_stages(config, override or [], ["ranks"], dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    guard(lambda: typer.run(main))
