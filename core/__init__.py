"""What every room uses: errors, metrics, whole-file writes, plugin files."""
