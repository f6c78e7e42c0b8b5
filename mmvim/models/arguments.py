"""Checks of constructor arguments: errors name the argument, what was given and expected."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

__all__ = ['flags', 'integer', 'number', 'one_of', 'pair', 'rate']


def one_of(name: str, value, choices: tuple) -> None:
    """Raise a ValueError unless ``value`` is one of the tuple ``choices``."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def integer(name: str, value, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        TypeError: It is no integer (True and False are none).
        ValueError: It is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')
    return int(value)


def number(name: str, value) -> float:
    """``value`` as a positive, finite float; a TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not 0 < value < float('inf'):
        raise ValueError(f'{name} must be positive and finite, got {value}')
    return float(value)


def rate(name: str, value) -> float:
    """``value`` as a probability below 1; a TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not 0 <= value < 1:
        raise ValueError(f'{name} must be at least 0 and below 1, got {value}')
    return float(value)


def pair(name: str, value) -> tuple[int, int]:
    """(vertical, horizontal) of one positive integer or of two."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f'{name} must be one integer or two, got {value!r}')
        return integer(name, value[0]), integer(name, value[1])
    return integer(name, value), integer(name, value)


def flags(**values) -> None:
    """Raise a TypeError unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f'{name} must be True or False, got {value!r}')
