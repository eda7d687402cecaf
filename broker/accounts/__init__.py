"""Accounts: who may ask."""
