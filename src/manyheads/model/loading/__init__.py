"""From a hub id, a folder or a GGUF file to a loaded module, after what its files say has been checked."""
