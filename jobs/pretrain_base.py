"""Pretrain the base GAN on the concepts of base.concepts with Ray Train.

ray job submit --working-dir . -- python jobs/pretrain_base.py --config configs/demo.yaml
"""

from __future__ import annotations

import typer

from farm.cli import guard, run_stages
from farm.options import Config, Json, Override


def main(config: Config, override: Override = None, dry_run: bool = False, as_json: Json = False) -> None:
    """Pretrain the base GAN on the concepts of base.concepts with Ray Train."""
    run_stages(config, override or [], ["base"], dry_run=dry_run, as_json=as_json)


if __name__ == "__main__":
    guard(lambda: typer.run(main))
