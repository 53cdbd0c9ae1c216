"""Ten architectures that somebody else wrote, converted to unitized BatchNorm and back, and folded.

    pip install timm torchvision          # torchvision without its compiled operators will do
    python benchmarks/zoo.py --out results/zoo.json [--only resnet18 ...]

For each architecture (random weights and affine parameters; running statistics recalibrated on noise): the largest
difference of the outputs after ``convert(model, "unitized")`` at alpha = 0, in evaluation and in training mode, in
float32 and in float64; whether ``convert(back, "torch")`` returns the original state dict bit for bit, under the same
names and module classes; and the same for ``fold``. In float64 the differences have to be rounding; in float32 deep
networks with random weights amplify it.
Timings are not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexnorm
from flexnorm.nn import UnitizedBatchNorm2d
from flexnorm.statistics import recalibrate
from flexnorm.surgery import conversion_plan, convert, fold, fold_plan


def register_torchvision_operators() -> None:
    """Let torchvision be imported beside a torch build that its compiled operators do not fit."""
    names = ["nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"]
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        for operator in (name, f"_{name}_backward"):
            library.define(f"{operator}(Tensor x) -> Tensor")
    globals()["_library"] = library  # the operators live as long as the library does


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **kwargs)

    return build


def _segmentation() -> nn.Module:
    from torchvision.models.segmentation import fcn_resnet50

    return fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


# Family, builder, input size.
ZOO: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "resnet18": ("ResNet", _timm("resnet18"), 64),
    "resnext50_32x4d": ("ResNeXt", _timm("resnext50_32x4d"), 64),
    "regnety_002": ("RegNet", _timm("regnety_002"), 64),
    "mobilenetv3_small_100": ("MobileNetV3", _timm("mobilenetv3_small_100"), 64),
    "efficientnet_b0": ("EfficientNet", _timm("efficientnet_b0"), 64),
    "densenet121": ("DenseNet", _timm("densenet121"), 64),
    "vgg11_bn": ("VGG-BN", _timm("vgg11_bn"), 64),
    "convnext_atto (BatchNorm)": ("ConvNeXt", _timm("convnext_atto", norm_layer="batchnorm2d", conv_mlp=True), 64),
    "convnext_atto (LayerNorm)": ("ConvNeXt", _timm("convnext_atto"), 64),
    "inception_v3": ("Inception", _timm("inception_v3", aux_logits=False), 128),
    "fcn_resnet50": ("segmentation", _segmentation, 64),
}


def randomize(model: nn.Module, size: int) -> None:
    """Affine parameters that are not trivially 0 or 1, and the running statistics that belong to them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for table, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3)):
                    table.copy_(torch.empty(table.shape).uniform_(low, high, generator=generator))
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        recalibrate(model, [torch.randn(8, 3, size, size, generator=generator) for _ in range(2)])


def measured(difference: Any) -> dict[str, Any]:
    return {
        "max_difference": difference.maximum,
        "largest_output": difference.scale,
        "max_difference_float64": difference.exact,
        "preserved": difference.preserved,
        "error": difference.error,
    }


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    equal: Callable[[Tensor, Tensor], bool] = lambda x, y: x.dtype == y.dtype and torch.equal(x, y)  # noqa: E731
    return list(first) == list(second) and all(equal(first[k], second[k]) for k in first)


def check(name: str) -> dict[str, Any]:
    family, build, size = ZOO[name]
    torch.manual_seed(0)
    model = build()
    randomize(model, size)
    x = torch.randn(4, 3, size, size)
    with warnings.catch_warnings():
        # Refused layers are in the result.
        warnings.simplefilter("ignore", UserWarning)
        plan = conversion_plan(model, "unitized", example_input=x)
        exact = conversion_plan(model.double(), "unitized", example_input=x.double())
        model = model.float()
        unitized = convert(model, "unitized")
        back = convert(unitized, "torch")
        folded = fold_plan(model, example_input=x)
        folded_unitized = fold(unitized, example_input=x)
    assert sum(isinstance(m, UnitizedBatchNorm2d) for m in unitized.modules()) == len(plan.converted)
    assert folded_unitized is not unitized
    classes = [type(m).__name__ for m in model.modules()]
    return {
        "architecture": name,
        "family": family,
        "normalizations": len(plan),
        "converted": len(plan.converted),
        "refused": {row.name: row.reason for row in plan.refused},
        "kinds": sorted({row.source for row in plan.converted}),
        "float32": {"evaluation": measured(plan.evaluation), "training": measured(plan.training)},
        "float64": {"evaluation": measured(exact.evaluation), "training": measured(exact.training)},
        "back_same_state_dict": same_state(model, back),
        "back_same_classes": classes == [type(m).__name__ for m in back.modules()],
        "folded": len(folded.folded),
        "fold": measured(folded.difference),
        "not_folded": {row.name: row.reason for row in folded.rows if not row.folded},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--only", nargs="*", choices=list(ZOO), help="these architectures only")
    options = parser.parse_args(arguments)
    try:
        import torchvision
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        register_torchvision_operators()
        import torchvision
    import timm

    rows = []
    for name in options.only or ZOO:
        row = check(name)
        rows.append(row)
        e32, t64 = row["float32"]["evaluation"], row["float64"]["training"]
        print(
            f"{name:27} {row['converted']:3}/{row['normalizations']:<3} converted  "
            f"eval float32 {e32['max_difference']:.1e} of {e32['largest_output']:.1e}  "
            f"train float64 {t64['max_difference']:.1e} of {t64['largest_output']:.1e}  "
            f"back {'same' if row['back_same_state_dict'] and row['back_same_classes'] else 'DIFFERENT'}  "
            f"folded {row['folded']:3} ({row['fold']['max_difference']:.1e})",
            flush=True,
        )
    if options.out:
        versions = {
            "flexnorm": flexnorm.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        }
        document = {"format": 1, "command": "python benchmarks/zoo.py", "versions": versions, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
