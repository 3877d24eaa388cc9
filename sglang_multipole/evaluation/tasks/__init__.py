"""The tasks, one a file; `registry` lists them."""
