"""Changes to a model before conversion, each with its own equality check."""
