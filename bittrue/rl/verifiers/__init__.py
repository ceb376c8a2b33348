"""Verifiers: checkers of answers behind one protocol, run in processes that can be killed."""
