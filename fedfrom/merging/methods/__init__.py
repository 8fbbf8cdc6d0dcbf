"""The merging methods, one a file, and the registry of their names."""
