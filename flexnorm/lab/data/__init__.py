"""Real images as tensors: bundled digits, local ``.npz`` files and image folders, Hugging Face data sets by name."""

from flexnorm.lab.data.images import ImageData, stratified
from flexnorm.lab.data.sources import load

__all__ = ["ImageData", "load", "stratified"]
