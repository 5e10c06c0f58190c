"""One HTML page that carries a model and runs it in a browser: python -m model.explore."""
