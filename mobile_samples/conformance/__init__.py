"""Vectors that every implementation of the contract runs."""
