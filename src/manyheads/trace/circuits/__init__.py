"""Which heads, components or edges carry a task: discovery methods, and how faithful what they find is."""
