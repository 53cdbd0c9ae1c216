"""Profile a network: train it a little, measure every normalization layer, and say what to change, with the number."""

from flexnorm.lab.profile.command import command
from flexnorm.lab.profile.load import load_model
from flexnorm.lab.profile.records import Finding, LayerProfile, Profile
from flexnorm.lab.profile.run import profile
from flexnorm.lab.profile.verdict import LIMITS, Limits

__all__ = ["LIMITS", "Finding", "LayerProfile", "Limits", "Profile", "command", "load_model", "profile"]
