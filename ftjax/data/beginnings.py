"""What several rows of tokens begin with alike, and so can stand once, with the rest of each as a branch (`types.BRANCH`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shared(rows: Sequence[np.ndarray], most: int) -> int:
    """Return with how many equal tokens all rows begin, at most `most`, which none is shorter than.

    >>> [shared([np.asarray([5, 6, 7]), np.asarray([5, 6, 8, 9])], most) for most in (0, 1, 3)]
    [0, 1, 2]
    """
    same = np.all([row[:most] == rows[0][:most] for row in rows], axis=0)
    return most if same.all() else int(np.argmin(same))
