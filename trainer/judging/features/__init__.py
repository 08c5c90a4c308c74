"""Features in context."""
