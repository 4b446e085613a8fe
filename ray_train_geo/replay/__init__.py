"""Replaying spot traces: what a job would have got done under different policies (level 0)."""
