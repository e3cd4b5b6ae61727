"""Averages of weights: as vectors and schedules, of checkpoint files, and in users' own loops."""
