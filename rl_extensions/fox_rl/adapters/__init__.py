"""Our components in the libraries that people already use. Importing one needs that library."""
