"""Features of videos and of sensors: files in, (T, D) arrays out, and a folder of them with what they are."""

from d2net.features.extract import Extractor, Features, extract_video
from d2net.features.folder import find_recordings, write_features
from d2net.features.i3d import I3D
from d2net.features.log import Written
from d2net.features.methods import Method, kinetics400, method_like, sensor_method, video_method
from d2net.features.sensor import Columns, extract_sensor, find_columns
from d2net.features.video import Video
from d2net.features.weights import load_i3d

__all__ = [
    "I3D",
    "Columns",
    "Extractor",
    "Features",
    "Method",
    "Video",
    "Written",
    "extract_sensor",
    "extract_video",
    "find_columns",
    "find_recordings",
    "kinetics400",
    "load_i3d",
    "method_like",
    "sensor_method",
    "video_method",
    "write_features",
]
