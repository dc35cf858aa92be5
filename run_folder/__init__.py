"""The run folder: its records, its arrays, its tables, and the store that owns them."""
