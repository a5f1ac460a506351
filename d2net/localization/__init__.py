"""From temporal class activation maps to detections in seconds (Sec. 3.3).

:class:`Localizer` turns TCAMs of any model into segments in snippets, :func:`localize` runs a network on a dataset.
"""

from d2net.localization.localizer import Localizer
from d2net.localization.network import classes_of, localize, of_dataset, predict, propose, to_detections

__all__ = ["Localizer", "classes_of", "localize", "of_dataset", "predict", "propose", "to_detections"]
