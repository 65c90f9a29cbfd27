"""Networks judged by their graphs, before they are trained: what a network would reach, and which of several is better."""
