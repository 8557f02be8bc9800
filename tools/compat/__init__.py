"""`make compat`: published fixtures of each format, loaded with other versions of the libraries."""
