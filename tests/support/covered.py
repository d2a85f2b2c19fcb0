"""Prints the share of covered lines of each folder of the package, from a JSON report of coverage.py.

python -m tests.support.covered coverage.json
"""

import collections
import json
import sys
from pathlib import PurePath

lines, run = collections.Counter(), collections.Counter()
for name, file in json.load(open(sys.argv[1], encoding="utf-8"))["files"].items():
    folder = str(PurePath(name).parent)
    lines[folder] += file["summary"]["num_statements"]
    run[folder] += file["summary"]["covered_lines"]
for folder in sorted(lines):
    print(f"{folder:32} {run[folder]:6} of {lines[folder]:6} lines {100 * run[folder] / max(1, lines[folder]):6.1f}%")
print(f"{'all':32} {run.total():6} of {lines.total():6} lines {100 * run.total() / lines.total():6.1f}%")
