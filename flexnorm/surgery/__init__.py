"""On any model: convert normalizations, fold for inference."""

from flexnorm.surgery.convert import conversion_plan, convert
from flexnorm.surgery.fold import FoldPlan, FoldRow, fold, fold_plan
from flexnorm.surgery.plan import ConversionPlan, ConversionRow

__all__ = [
    "ConversionPlan",
    "ConversionRow",
    "FoldPlan",
    "FoldRow",
    "conversion_plan",
    "convert",
    "fold",
    "fold_plan",
]
