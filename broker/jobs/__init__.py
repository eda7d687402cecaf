"""Jobs: slow work that nobody waits for on an open connection (``docs/jobs.md``)."""
