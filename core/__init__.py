"""The ground of every room: errors, metrics, whole-file writes, plugin files."""
