"""Documentation, and the program that keeps its quotations true."""
