"""What else learns a language from its prompt, and n-gram heads in models of real prose."""
