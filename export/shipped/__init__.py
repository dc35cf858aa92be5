"""What is copied into exported folders: it imports nothing of Foldrace's other rooms."""
