"""`python -m bitdelta`: a diagnosis to paste into an issue."""

from .config import show_config

show_config()
