"""What every command shares with the terminal: its lines, errors, progress, logs and lock."""
