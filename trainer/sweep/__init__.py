"""Many dictionaries at once: what a grid of them came to, as numbers, plots and a page."""
