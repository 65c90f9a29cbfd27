"""Commands of `manyheads judge`, by what they ask for."""
