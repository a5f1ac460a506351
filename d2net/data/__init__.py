"""Datasets: features, recording-level labels and, for evaluation, annotated segments."""

from d2net.data.convert import convert
from d2net.data.dataset import Dataset, Recording
from d2net.data.layouts import open_dataset, train_and_test
from d2net.data.simulated import simulate

__all__ = ["Dataset", "Recording", "convert", "open_dataset", "simulate", "train_and_test"]
