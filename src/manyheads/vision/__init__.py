"""Prediction heads on pictures: poses of heads and bodies, boxes and masks, what changes with a view and what does not."""

from manyheads.vision.core.pictures import read_picture
from manyheads.vision.core.predicting import Sight, predictor, predictors

__all__ = ["Sight", "predictor", "predictors", "read_picture"]
