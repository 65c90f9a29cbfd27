"""Which regions of an input decide (#93): insertion, deletion, LiMA."""
