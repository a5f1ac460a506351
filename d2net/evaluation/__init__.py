"""Mean average precision and F1 of detections, under the two protocols of the field: :func:`evaluate`; which errors
keep them low: :func:`analyse_errors`; how well short and long ground truths are found: :func:`analyse_lengths`; and
average recall at an average number of detections a recording: :func:`average_recall`.

``activitynet``, after the ActivityNet toolkit (activitynet/ActivityNet, Evaluation/eval_detection.py): time is
continuous. Detections of a class are taken by falling score; each is matched to the unmatched ground truth of highest
IoU among those that reach the threshold (of equal IoUs the later in time). A detection in a recording without ground
truth of its class is a false positive, also where the recording has none at all. Ambiguous segments are ignored.

``wtalc``, after the W-TALC family (naraysa/D2-Net, detectionMAP.py, from sujoyp/wtalc-pytorch, whose AP is not
interpolated): times become snippet indices, round(s * 25 / 16), half to even, and IoU is that of index ranges. Each
detection is matched to the first unmatched ground truth that reaches the threshold, in order of time, or in the order
of the W-TALC family's own files (``Annotations.rank``). Recordings without segments are left out with all their
detections, and so are detections that touch an ambiguous segment (of any class). Two bugs of the originals are not
reproduced: a class without detections shifts the ground truth of all later classes by one (D2-Net), or makes the mAP 0
(W-TALC). Here its AP is 0 and the other classes keep theirs.

Under both, the order of a file does not matter: detections of equal score are taken by recording (its name), start and
end, and ground truth by start and end. In the published evaluators it depends on the file and on an unstable sort.

Under both, the mean is over the classes that have ground truth, and a class without detections has AP 0. What was left
out, and why, is in :class:`Coverage`. docs/evaluation.md has a table of missing, ambiguous, empty and unknown.
"""

from d2net.evaluation.errors import VERDICTS, ErrorAnalysis, Verdict, analyse_errors, error_level
from d2net.evaluation.frames import is_action, snippet_auc
from d2net.evaluation.judge import evaluate
from d2net.evaluation.lengths import (
    ACTIVITYNET_LENGTHS,
    LENGTHS,
    THUMOS14_LENGTHS,
    LengthAnalysis,
    analyse_lengths,
)
from d2net.evaluation.levels import ACTIVITYNET_TIOU, AVERAGES, THUMOS14_TIOU, averages, span
from d2net.evaluation.names import UnknownVideos
from d2net.evaluation.operating import FALSE_POSITIVES, RECALLS, OperatingPoints, operating_points
from d2net.evaluation.prepare import Protocol
from d2net.evaluation.recall import AverageRecall, average_recall
from d2net.evaluation.result import Coverage, Evaluation, Reason

__all__ = [
    "ACTIVITYNET_LENGTHS",
    "ACTIVITYNET_TIOU",
    "AVERAGES",
    "FALSE_POSITIVES",
    "LENGTHS",
    "RECALLS",
    "THUMOS14_LENGTHS",
    "THUMOS14_TIOU",
    "VERDICTS",
    "AverageRecall",
    "Coverage",
    "ErrorAnalysis",
    "Evaluation",
    "LengthAnalysis",
    "OperatingPoints",
    "Protocol",
    "Reason",
    "UnknownVideos",
    "Verdict",
    "analyse_errors",
    "analyse_lengths",
    "average_recall",
    "averages",
    "error_level",
    "evaluate",
    "is_action",
    "operating_points",
    "snippet_auc",
    "span",
]
