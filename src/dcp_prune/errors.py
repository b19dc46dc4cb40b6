"""The errors users can meet: every message is one sentence that names the cause and the way out."""


class DcpPruneError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(DcpPruneError, ValueError):
    """A value cannot be used: a budget, an image, a question, features with NaN."""


class NonFiniteError(InvalidInputError):
    """Features or signals contain NaN, inf, or numbers too large to square, so no selection is possible."""


class MissingSignalError(DcpPruneError):
    """A pruner needs a signal (the [CLS] attention, the question, ...) that the tokens do not carry."""


class UnsupportedModelError(DcpPruneError):
    """The model has no adapter, or is set up in a way that pruning cannot support."""


class UnsupportedVersionError(DcpPruneError):
    """The installed transformers lacks something that this package needs."""


class UnknownPrunerError(DcpPruneError, KeyError):
    """No pruner of that name is registered; the message suggests near names."""

    def __str__(self) -> str:  # KeyError would print the repr of the sentence
        return str(self.args[0]) if self.args else ""


class RecordsError(DcpPruneError):
    """Records of a sweep cannot be read or written: another version, a truncated file, a full disk, a second writer."""
