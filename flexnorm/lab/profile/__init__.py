"""Profile a network: train it a little, measure every normalization layer, and say what to change, with the number."""

from flexnorm.lab.profile.load import load_model
from flexnorm.lab.profile.records import Finding, LayerProfile, Profile
from flexnorm.lab.profile.run import profile
from flexnorm.lab.profile.terminal import print_profile
from flexnorm.lab.profile.verdict import LIMITS, Limits

__all__ = ["LIMITS", "Finding", "LayerProfile", "Limits", "Profile", "load_model", "print_profile", "profile"]
