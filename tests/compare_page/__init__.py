"""The compare page in a browser, and its routes."""
