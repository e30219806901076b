"""Calibration: what the inputs of a model's linears look like, taken by running it, kept in one file."""

from .collect import calibrate
from .collected import Collected
from .collection import StatisticsCollection
from .statistics_file import StatisticsFile, save_statistics

__all__ = ["Collected", "StatisticsCollection", "StatisticsFile", "calibrate", "save_statistics"]
