"""Datasets: features, recording-level labels and, for evaluation, annotated segments."""

from d2net.data.catalog import Catalog, train_and_test
from d2net.data.convert import convert
from d2net.data.dataset import Dataset, Recording
from d2net.data.layouts import find_dataset, open_dataset, read_annotations
from d2net.data.simulated import simulate
from d2net.data.times import Times

__all__ = [
    "Catalog",
    "Dataset",
    "Recording",
    "Times",
    "convert",
    "find_dataset",
    "open_dataset",
    "read_annotations",
    "simulate",
    "train_and_test",
]
