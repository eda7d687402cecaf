"""Writers of model files, one module a format; importing this imports no backend."""
