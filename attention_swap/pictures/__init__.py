"""Pictures of what attention shows."""
