"""Fault injection: small farms in a bucket of Ceph's gateway, over a wire that fails at one call in ten.

    python bench/faults.py [--runs 20] [--json bench/results/faults-cpu.jsonl]

The wire loses requests and answers, cuts answers short, and says that the server is busy. `farm`: three drivers take
six adapters from a queue, commit and publish them. `race`: four publishers publish three adapters each of one concept.
All the while somebody reads everything there is. Nothing may be half visible at any moment; in the end every adapter is
there and has been published once, in order. Prints a JSON line a run, of seed 0, 1 and so on, and last how many passed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import boto3
from machine import machine, sayer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "farm"))  # before this file's folder: it has a faults too
import faults
import rgw
from wire import wire_to

from farm.s3 import S3Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--json", type=Path, help="a file for the lines as well")
    options = parser.parse_args()
    say = sayer(options.json)
    say(machine())
    os.environ |= {"AWS_ACCESS_KEY_ID": rgw.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": rgw.SECRET_KEY}
    passed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, rgw.ceph(Path(folder)) as ceph:
        endpoint = rgw.Gateway(ceph).start().endpoint
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="farm")
        with faults.hasty(), wire_to(endpoint) as wire:
            for what, attempt in (("farm", faults.farm), ("race", faults.race)):
                for seed in range(options.runs):
                    began = time.monotonic()
                    note = attempt(S3Store("farm", f"{what}-{seed}", endpoint), wire, seed)
                    passed += not note["problems"]
                    say({"what": what, **note, "seconds": round(time.monotonic() - began, 1)})
    say({"runs": 2 * options.runs, "passed": passed})
    sys.exit(passed < 2 * options.runs)


if __name__ == "__main__":
    main()
