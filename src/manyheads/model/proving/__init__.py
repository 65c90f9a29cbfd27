"""What is proved of a model at the door, and the certificate that measures it under every way to run it."""
