"""Trainings that are compared: a task's sides, its runs, and their tables and pictures."""
