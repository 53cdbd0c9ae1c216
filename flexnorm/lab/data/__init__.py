"""Real images as tensors: bundled digits, local ``.npz`` files and image folders, Hugging Face data sets by name."""

from flexnorm.lab.data.images import ImageData
from flexnorm.lab.data.load import load
from flexnorm.lab.data.subset import stratified

__all__ = ["ImageData", "load", "stratified"]
