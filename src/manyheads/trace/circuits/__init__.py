"""Which heads, components or edges perform a task: discovery methods, and tests of what they find."""
