"""Judging predictors: how far models that fit as well disagree, whom to trust where, what more data would bring."""
