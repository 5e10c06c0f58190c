"""Pages made of what runs have logged: one run, or several laid over each other."""
