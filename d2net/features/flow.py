"""Optical flow between the frames of a video, as the flow network of I3D takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from d2net.errors import InputError

METHODS = ("dis", "tvl1")
LARGEST = 20.0  # pixels a frame: what is faster is taken as this fast, which the network sees as 1


def flow_function(method: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """How far each pixel moves from one frame to the next.

    Args:
        method: ``dis`` (Kroeger et al., ECCV 2016; fast) or ``tvl1`` (Zach et al., 2007; what I3D was trained with,
            slow, and only in OpenCV's contributed modules).

    Returns:
        A function of two (height, width, 3) uint8 RGB frames to (height, width, 2) float32 in [-1, 1]: the motion to
        the right and down, of which 1 stands for 20 pixels or more.

    Raises:
        InputError: OpenCV, or this method of it, is not installed; no such method.
    """
    if method not in METHODS:
        raise InputError(f"--flow {method}: give {' or '.join(METHODS)}")
    try:
        import cv2 as opencv
    except ImportError as error:
        raise InputError(
            "optical flow is computed by OpenCV, which is not installed; run: pip install 'd2net[flow]'"
        ) from error
    cv2: Any = opencv  # whose types know of no optical flow
    if method == "dis":
        algorithm = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    elif hasattr(cv2, "optflow"):
        algorithm = cv2.optflow.DualTVL1OpticalFlow_create()
    else:
        raise InputError(
            "--flow tvl1: this OpenCV has no TV-L1; run: pip uninstall opencv-python-headless && "
            "pip install opencv-contrib-python-headless; or use --flow dis"
        )

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
        return np.clip(algorithm.calc(*grey, None), -LARGEST, LARGEST) / LARGEST

    return flow
