"""Environment variables that switch something off."""

import os


def is_on(switch: str) -> bool:
    """What the variable of this name says; on where it is not set.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    value = os.environ.get(switch, '1')
    if value not in ('0', '1'):
        raise ValueError(f'{switch} must be 0 or 1, got {value!r}')
    return value == '1'
