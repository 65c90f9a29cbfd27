"""One file a family of prompts."""
