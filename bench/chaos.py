"""Chaos: a small real farm on a small real cluster, of which something is killed at a random moment.

    python bench/chaos.py [--seeds 0-19] [--json bench/results/chaos-cpu.jsonl]

Sixteen seeds in a row are every victim (a worker process, a node, the driver, the head) in every stage, each at some
random moment. What is killed gets SIGKILL. A farm that lost a worker or a node must end by itself; after the driver or
the head the same command is run again. Then its artifacts must equal those of an undisturbed run byte for byte, and
nothing that was finished may have been written again. --away: two runs more, in which the store is away for so many
seconds in the edits and in the adapters, and the run must end by itself. Prints a JSON line a run, and last how many
passed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from machine import machine, sayer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "farm"))  # before this file's folder: it has a chaos too
from chaos import Draw, calm_run, chaos_run, draw
from ray_nodes import cluster_in


def numbers(text: str) -> list[int]:
    """`3`, `0-19`, or several of these with commas between."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=numbers, default="0-19", help="such as 3 or 0-19,25")
    parser.add_argument("--away", type=float, default=60.0, metavar="SECONDS", help="0 leaves those runs out")
    parser.add_argument("--json", type=Path, help="a file for the lines as well")
    parser.add_argument("--keep", type=Path, help="a new folder, of a short path, for the stores and logs")
    options = parser.parse_args()
    say = sayer(options.json)
    root = options.keep or Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    root.mkdir(exist_ok=True)
    passed = 0
    try:
        say(machine())
        with cluster_in(root / "c") as cluster:
            calm, seconds = calm_run(cluster, root / "calm")
        say({"undisturbed_s": seconds})
        draws = [draw(seed) for seed in options.seeds]
        if options.away:
            draws += [Draw(-1, "store", "edits", 0.5, options.away), Draw(-2, "store", "adapter", 0.3, options.away)]
        for drawn in draws:
            name = f"{drawn.victim}{drawn.seed}"
            try:
                with cluster_in(root / f"c-{name}") as cluster:
                    note = chaos_run(cluster, root / f"f-{name}", drawn, calm, seconds)
            except AssertionError as error:  # nothing was killed
                note = {"seed": drawn.seed, "problems": [str(error)]}
            passed += not note["problems"]
            say(note)
        say({"runs": len(draws), "passed": passed})
    finally:
        if not options.keep:
            shutil.rmtree(root)
    sys.exit(passed < len(draws))


if __name__ == "__main__":
    main()
