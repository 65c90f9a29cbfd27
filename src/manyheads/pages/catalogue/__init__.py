"""The catalogue as a page: one HTML file, and the part of it that stands in the documentation."""
