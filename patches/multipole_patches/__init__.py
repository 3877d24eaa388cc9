"""What this extension changes in SGLang, one change a file."""
