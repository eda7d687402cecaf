"""The contract: formats, tasks, limits and errors that every part of nearfar shares."""
