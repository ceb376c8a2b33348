"""Speculation: who guesses the next tokens, and how many guesses pay. Nothing here changes a token."""
