"""Which regions of an input decide an answer (#93): insertion, deletion, LiMA."""
