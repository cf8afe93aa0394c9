"""`longact compare`: training runs side by side on one page."""
