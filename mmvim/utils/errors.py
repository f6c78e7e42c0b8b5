"""Errors that are meant for the user."""

__all__ = ['CheckpointError']


class CheckpointError(ValueError):
    """A checkpoint that cannot or must not be loaded; the message is meant for the user."""
