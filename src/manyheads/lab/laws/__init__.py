"""Laws that any learner or model can be held to."""
