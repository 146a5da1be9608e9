"""Torture a cache and the runs trained from it: kills, flipped bits, a full disk, lies.

    stress.py kills | bits | disk | lies | fuzz | speed | train | all

Everything runs on a tiny corpus with a callable teacher, so that thousands of blows take minutes;
the price is that sizes at which a real disk or a real teacher behaves otherwise are not met. Each
command draws from its seed, prints one table, and exits 1 if anything is wrong. Only `kills` and
`train` are not repeatable to the letter: when a signal arrives is up to the machine.
"""

from __future__ import annotations

from stress_tests import bits, disk, fuzz, kills, lies, speed, train  # noqa: F401 (their commands)
from stress_tests.report import main

if __name__ == "__main__":
    main()
