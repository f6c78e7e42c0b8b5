"""The version of both distributions, mmvim-ops and mmvim; every other place reads it here."""

__version__ = '0.1.0'
