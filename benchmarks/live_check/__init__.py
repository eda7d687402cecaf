"""The simulator's figures against those of real processes: see ``__main__``."""
