"""Profile a network: train it a little, measure every normalization layer, and say what to change, with the number."""

from flexnorm.lab.profile.load import load_model
from flexnorm.lab.profile.records import LIMITS, Finding, LayerProfile, Limits, Profile
from flexnorm.lab.profile.run import profile
from flexnorm.lab.profile.terminal import print_profile

__all__ = ["LIMITS", "Finding", "LayerProfile", "Limits", "Profile", "load_model", "print_profile", "profile"]
