"""Finding things in pictures: detectors and what helps them learn, and words that say which thing is meant."""
