"""How well a number a snippet tells action from background: :func:`snippet_auc`."""

from __future__ import annotations

import numpy as np

from d2net.data.dataset import Recording
from d2net.errors import InputError


def is_action(recording: Recording, snippets: int) -> np.ndarray:
    """(T,) 1 where the middle of a snippet is within a segment of any class, -1 within an ambiguous one, else 0.

    Args:
        recording: Annotated.
        snippets: Their number, T.
    """
    middle = recording.first_snippet + (np.arange(snippets) + 0.5) * recording.seconds_per_snippet
    state = np.zeros(snippets, np.int8)
    for value, rows in ((-1, recording.ambiguous), (1, [(start, end) for start, end, _ in recording.segments])):
        for start, end in rows:
            state[(start <= middle) & (middle < end)] = value
    return state


def snippet_auc(score: np.ndarray, action: np.ndarray) -> float | None:
    """Area under the ROC curve in percent: how often a snippet of an action has the higher score than one of none.

    Equal scores count half.

    Args:
        score: (N,) of all snippets together.
        action: (N,) of :func:`is_action`; snippets of -1 do not count.

    Raises:
        InputError: arrays of different lengths, or a score that is NaN.

    Returns:
        None where there is no snippet of an action, or none of background.
    """
    score, action = np.asarray(score), np.asarray(action)
    if score.ndim != 1 or score.shape != action.shape or np.isnan(score).any():
        raise InputError(
            f"snippet_auc: scores of shape {score.shape} and actions of shape {action.shape}; give one "
            "of each a snippet, and no NaN"
        )
    score, positive = score[action >= 0], action[action >= 0] == 1
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    _, index, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # of equal scores the mean
    return float(100 * (rank[index][positive].sum() - n * (n + 1) / 2) / (n * m))
