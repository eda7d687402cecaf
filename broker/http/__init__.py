"""HTTP: thin handlers between aiohttp and the rest of the broker."""
