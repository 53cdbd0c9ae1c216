"""Profile a network: train it a little, measure every normalization layer, and say what to change, with the number."""

from flexnorm.lab.profile.load import load_model
from flexnorm.lab.profile.progress import Progress
from flexnorm.lab.profile.records import LIMITS, Finding, LayerProfile, Limits, Profile
from flexnorm.lab.profile.run import profile
from flexnorm.lab.profile.terminal import display, print_profile

__all__ = ["LIMITS", "Finding", "LayerProfile", "Limits", "Profile", "Progress", "display", "load_model"]
__all__ += ["print_profile", "profile"]
