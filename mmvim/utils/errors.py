"""Errors that the user can mend."""

__all__ = ['UserError']


class UserError(Exception):
    """Something only the user can mend; the tools show it without a traceback."""
