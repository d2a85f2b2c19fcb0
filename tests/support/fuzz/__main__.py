"""`python -m tests.support.fuzz`: malformed inputs for every reader of files and settings; status 1 unless there is no fault.

A fault is a crash (an exception that is neither an IcarError nor an OSError, or a dead process), a hang, memory beyond the
reader's bound, silence (an input that must be refused is accepted, or read as something else), an event (a process started, a
connection opened, a file written elsewhere, a name of a pickle looked up), or a message of more than 4,000 characters.
Inputs are the same for the same --seed; `--only READER --first N --count 1` repeats a single one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def main(words: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__.split("\n")[0])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--count", type=int, default=0, metavar="N", help="inputs of all readers together (default: --seconds alone)"
    )
    p.add_argument(
        "--seconds", type=float, default=0, metavar="S", help="stop after so long (default: 180, or none with --count)"
    )
    p.add_argument("--hang-s", type=float, default=60, metavar="S", help="seconds after which an input counts as a hang (60)")
    p.add_argument("--only", action="append", default=[], metavar="READER", help="readers to run; may be repeated")
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input")
    p.add_argument(
        "--keep", type=Path, default=Path("workdir/fuzz"), metavar="DIR", help="where inputs with faults are written"
    )
    args = p.parse_args(words)
    os.environ |= {"JAX_PLATFORMS": "cpu", "ICAR_JAX_CACHE": "off"}
    from tqdm import tqdm

    from tests.support.fuzz.readers import READERS
    from tests.support.fuzz.run import clean, fuzz, table

    if unknown := sorted(set(args.only) - set(READERS)):
        p.error(f"unknown readers {', '.join(unknown)}; expected {', '.join(READERS)}")
    chosen = {name: READERS[name] for name in args.only or READERS}
    seconds = args.seconds or (float("inf") if args.count else 180)
    share = -(-args.count // len(chosen)) if args.count else sys.maxsize
    tallies, began = {}, time.monotonic()
    with tqdm(total=args.count or None, unit="input", disable=None) as bar:
        for done, (name, reader) in enumerate(chosen.items()):
            bar.set_description(name)
            left = began + seconds - time.monotonic()
            until = time.monotonic() + max(left, 0) / (len(chosen) - done)
            tallies[name] = fuzz(reader, args.seed, share, until, args.hang_s, args.keep, bar.update, args.first)
    print(table(tallies))
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s")
    return 0 if clean(list(tallies.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
