"""What people look at: the HTML report of a run, and the progress shown while it runs."""
