"""Heavy jobs: submitted, followed and fetched later, also after a restart of the app."""
