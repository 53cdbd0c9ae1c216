"""Real images as tensors: bundled digits, local ``.npz`` files and image folders, Hugging Face data sets by name."""

from evenkeel.data.images import ImageData
from evenkeel.data.load import load
from evenkeel.data.subset import stratified

__all__ = ["ImageData", "load", "stratified"]
