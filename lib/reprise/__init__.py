"""Reprise: deep-learning papers, rebuilt and re-measured."""

__version__ = "0.1.0"
