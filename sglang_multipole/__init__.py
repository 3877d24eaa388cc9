"""Multipole Attention as an SGLang extension."""

__version__ = "0.1.0"
