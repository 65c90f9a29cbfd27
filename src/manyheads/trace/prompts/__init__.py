"""Class prompts for vision transformers and their attention maps: Prompt-CAM (#119)."""
