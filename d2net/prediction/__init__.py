"""From a trained network, or from the published I3D alone, and features or videos to detections."""

from d2net.prediction.inputs import Inputs, open_inputs
from d2net.prediction.kinetics import KINETICS400, Kinetics400
from d2net.prediction.predictor import Predictor, load

__all__ = ["KINETICS400", "Inputs", "Kinetics400", "Predictor", "load", "open_inputs"]
