"""Code that tests of several folders share, next to the fixtures of conftest.py."""
