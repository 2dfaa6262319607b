"""Export published concepts as packs for phones, each pack a Ray task: `farm export --ray`, with all its options.

ray job submit --working-dir . -- python jobs/export_mobile.py --config configs/demo.yaml --all --max-mb 20
"""

from __future__ import annotations

import sys

import typer

from farm.cli import guard
from farm.cli_export import export

if __name__ == "__main__":
    sys.argv.append("--ray")
    guard(lambda: typer.run(export))
