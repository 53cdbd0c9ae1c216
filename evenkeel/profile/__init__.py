"""Profile a network: train it a little, measure every normalization layer, and say what to change, with the number."""

from evenkeel.profile.command import command
from evenkeel.profile.load import load_model
from evenkeel.profile.records import Finding, LayerProfile, Profile
from evenkeel.profile.run import profile
from evenkeel.profile.verdict import LIMITS, Limits

__all__ = ["LIMITS", "Finding", "LayerProfile", "Limits", "Profile", "command", "load_model", "profile"]
