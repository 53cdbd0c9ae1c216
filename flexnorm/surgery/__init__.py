"""On any model: convert normalizations, fold for inference."""

from flexnorm.surgery.convert import conversion_plan, convert
from flexnorm.surgery.fold import FoldPlan, FoldRow, fold, fold_plan
from flexnorm.surgery.normprop.convert import NormPropPlan, convert_to_normprop, normprop_plan
from flexnorm.surgery.plan import ConversionPlan, ConversionRow

__all__ = ["ConversionPlan", "ConversionRow", "FoldPlan", "FoldRow", "NormPropPlan", "conversion_plan", "convert"]
__all__ += ["convert_to_normprop", "fold", "fold_plan", "normprop_plan"]
