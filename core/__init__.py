"""The ground of every room: errors, metrics, whole-file writes, plugins and their tables."""
