"""Generated from proto/adaattn/v1 when the package is built (setup.py)."""
