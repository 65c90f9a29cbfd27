"""Class prompts for vision transformers (#119) and their maps."""
