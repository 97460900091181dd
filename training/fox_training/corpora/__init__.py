"""Texts that ship with the package; see the .md beside each file for its source and licence."""
