"""Interpreters of model files, one module each; importing this imports no backend."""
