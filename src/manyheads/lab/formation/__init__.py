"""How attention comes to select: what forms abruptly, and where its direction goes."""
