"""How the held-out losses respond to the share of each domain, and the best shares that follow.

With a log law L_i = c_i − Σ_j t_ij ln n_j, the mean loss falls most per row of domain j by its
column sum g_j = Σ_i t_ij, and shares in proportion to g are best for the mean. D runs, each with
one share raised, give g: the ceiling for any rule that moves weights. The price is D + 1 runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benches.common import Floats

RAISED = 1.75
"""Factor of the raised share."""


def raised(domains: int, number: int) -> Floats:
    """Return (D) even shares of which one is raised."""
    shares = np.full(domains, (1 - RAISED / domains) / (domains - 1))
    shares[number] = RAISED / domains
    return shares


def best_shares(even: Floats, losses: Sequence[Floats]) -> Floats:
    """Return (D) shares in proportion to the column sums, none below a tenth of the even one.

    `even` are the (D) losses under even shares, `losses` those of each run with a raised share.
    """
    D = len(even)
    up, down = math.log(RAISED), math.log((D - RAISED) / (D - 1))
    fall = np.array([(even - one).sum() for one in losses])
    total = fall.sum() / (up - down + down * D)
    column = np.maximum((fall - down * total) / (up - down), 0.0)
    shares = column / column.sum() if column.any() else np.full(D, 1 / D)
    shares = np.maximum(shares, 0.1 / D)
    return np.asarray(shares / shares.sum())
