"""What the cloud's answer is worth, given the local one's confidence: measured and stored."""

from edge_runtime.gain.curve import GainCurve
from edge_runtime.gain.store import GainLookup, gain_folder, load_gain

__all__ = ["GainCurve", "GainLookup", "gain_folder", "load_gain"]
