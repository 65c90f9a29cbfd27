"""What manyheads raises for bad input: one clear sentence that says what was given, what was expected, what to do."""


class ManyheadsError(Exception):
    """Any error of ours. The command line prints its sentence and exits with code 2."""


class InputError(ManyheadsError, ValueError):
    """An argument, a file or a tokenizer is not what the call needs."""


class UnsupportedError(ManyheadsError):
    """The input is fine, but this architecture (or this edit) cannot do what was asked."""


class MismatchError(ManyheadsError):
    """A saved thing belongs to another model than the one it is used with."""
