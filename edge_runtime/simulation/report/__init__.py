"""The page and the table of a simulation: the same figures for people as in the JSON file."""
