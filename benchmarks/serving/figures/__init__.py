"""What is measured: one module a figure, each with a ``measure`` that says what it found."""
