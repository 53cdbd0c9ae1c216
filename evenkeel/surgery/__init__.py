"""On any model: convert normalizations, fold for inference, freeze, re-estimate population statistics."""

from evenkeel.surgery.accumulate import Accumulation, accumulate
from evenkeel.surgery.convert import conversion_plan, convert
from evenkeel.surgery.fold import FoldPlan, FoldRow, fold, fold_plan
from evenkeel.surgery.frozen import freeze, is_frozen, unfreeze
from evenkeel.surgery.plan import ConversionPlan, ConversionRow
from evenkeel.surgery.recalibrate import recalibrate

__all__ = [
    "Accumulation",
    "ConversionPlan",
    "ConversionRow",
    "FoldPlan",
    "FoldRow",
    "accumulate",
    "conversion_plan",
    "convert",
    "fold",
    "fold_plan",
    "freeze",
    "is_frozen",
    "recalibrate",
    "unfreeze",
]
