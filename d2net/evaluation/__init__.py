"""Mean average precision and F1 of detections, under the two protocols of the field: :func:`evaluate`; and which errors
keep them low: :func:`analyse_errors`.

``activitynet``, after the ActivityNet toolkit (activitynet/ActivityNet, Evaluation/eval_detection.py): time is
continuous; detections of a class by falling score, each takes the unmatched ground truth with the highest IoU among
those that reach the threshold (of equal IoUs the later in time). A detection in a video without ground truth of its
class is a false positive, also where the video has none at all. Ambiguous segments are not known.

``wtalc``, after the W-TALC family (naraysa/D2-Net, detectionMAP.py, from sujoyp/wtalc-pytorch, whose AP is not
interpolated): times become snippet indices, round(s * 25 / 16), half to even, and IoU is that of index ranges; each
detection takes the first unmatched ground truth that reaches the threshold, in order of time, or of the W-TALC
family's own files (``Annotations.rank``).
Videos without segments are left out with all their detections, and so are detections touching an ambiguous segment
(of any class). Two faults are not followed: a class without detections shifts the ground truth of all later classes
by one (D2-Net), or makes the mAP 0 (W-TALC); here its AP is 0 and the others are what they are.

The order of a file says nothing, under neither: detections of equal score come by recording (its name), start and end,
and ground truth by start and end. The published evaluators leave that to the file and to an unstable sort.

Under both, the mean is over the classes that have ground truth, and a class without detections has AP 0. What was left
out, and why, is in :class:`Coverage`. docs/evaluation.md has a table of missing, ambiguous, empty and unknown.
"""

from d2net.evaluation.errors import VERDICTS, ErrorAnalysis, Verdict, analyse_errors, error_level
from d2net.evaluation.judge import ACTIVITYNET_TIOU, THUMOS14_TIOU, evaluate
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.prepare import Protocol
from d2net.evaluation.result import Coverage, Evaluation, Reason

__all__ = [
    "ACTIVITYNET_TIOU",
    "THUMOS14_TIOU",
    "VERDICTS",
    "Coverage",
    "ErrorAnalysis",
    "Evaluation",
    "Protocol",
    "Reason",
    "UnknownVideos",
    "Verdict",
    "analyse_errors",
    "error_level",
    "evaluate",
]
