"""The sweep's configuration: its records, its reader, and the words for its problems."""
