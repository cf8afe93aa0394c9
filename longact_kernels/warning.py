"""The category of this package's warnings."""


class LongActWarning(UserWarning):
    """Every warning of this package is one: `warnings.filterwarnings("error", category=LongActWarning)` finds them."""
