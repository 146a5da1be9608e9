"""Stress tests of caches and training runs: kills, flipped bits, a full disk, false documents.

    stress.py kills | bits | disk | lies | fuzz | speed | train | all

Everything runs on a tiny corpus with a callable teacher, so thousands of faults take minutes; the
price is that effects which appear only at size are not tested. Each command is seeded, prints one
table, and exits 1 after any violation. Only `kills` and `train` do not repeat exactly, because the
moment at which a signal arrives depends on the machine.
"""

from __future__ import annotations

from stress_tests import bits, disk, fuzz, kills, lies, speed, train  # noqa: F401 (their commands)
from stress_tests.report import main

if __name__ == "__main__":
    main()
