"""Bins of equal ratio that relative errors are counted in, so that prompts and layers can be pooled."""

import numpy as np

LOWEST, DECADES, PER_DECADE = 1e-5, 6, 64
EDGES = LOWEST * 10.0 ** (np.arange(DECADES * PER_DECADE + 1) / PER_DECADE)
BINS = len(EDGES) + 1  # below the first edge, between two, from the last on
UPPER = np.append(EDGES, np.inf)
