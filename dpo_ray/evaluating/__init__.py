"""Policies compared: sampled, judged, measured, and how sure that is."""
