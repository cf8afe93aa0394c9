"""The category of this package's warnings."""


class LongActWarning(UserWarning):
    """The class of all warnings of this package.

    `warnings.filterwarnings("error", category=LongActWarning)` turns them into errors.
    """
