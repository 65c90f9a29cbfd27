"""Pages and tables of results. They know the results they show; results know nothing of them."""
