#!/usr/bin/env bash
# torch 2.13.0: nn.TransformerEncoderLayer does not call the modules that stand in the place of its norms, if it is
# evaluated without gradients.
#
# The guess: whoever replaces `layer.norm1` by another module has replaced it; forward calls it.
# What happens: in evaluation and with gradients off the layer takes a fused path, which reads `weight`, `bias` and `eps`
# of whatever module is there and computes layer normalization from them. A module that means something else by these
# names is passed over without a word, and the same model gives two answers: with gradients on, and under no_grad. Hooks
# on the layer, or `activation_relu_or_gelu = 0`, keep it off that path.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env
env/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > program.py <<'PY'
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")


class Identity(nn.Module):
    """Has what the fused path reads, and returns its input."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16)), 1e-5

    def forward(self, x):
        return x


torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
layer.norm1, layer.norm2 = Identity(), Identity()
x = torch.randn(4, 5, 16)
called = layer(x).detach()
with torch.no_grad():
    fused = layer(x)
layer.activation_relu_or_gelu = 0
with torch.no_grad():
    kept_off = layer(x)
same = torch.allclose(called, kept_off, atol=1e-5)
print(same, bool((called - fused).abs().max() > 0.1), bool(fused.mean(-1).abs().max() < 1e-5))
PY
seen=$(env/bin/python program.py)
echo "called as off the path, differs on it, layer normalization there: $seen"
[ "$seen" = "True True True" ] || { echo "changed"; exit 1; }
echo "as described"
